"""A client that is killed: leaving_client.py ADDRESS CALLS SEED asks, says so and waits for its end."""

import random
import sys
import threading

import grpc
import honest_messages


def main() -> None:
    address, calls, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng, channel = random.Random(seed), grpc.insecure_channel(address)
    running = []
    for _ in range(calls):
        path, data = honest_messages.request(rng, 200)
        running.append(channel.unary_stream(path)(data))
    first = channel.unary_unary("/jaxinfer.v1.GenerationService/GetLoad")(b"", timeout=60)  # behind them: all are sent
    print("asked", flush=True)
    threading.Event().wait(60)
    del running, first


if __name__ == "__main__":
    main()
