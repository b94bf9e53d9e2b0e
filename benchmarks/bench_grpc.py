"""What the service costs on top of gRPC: CPU of the server's process a streamed token, over that of a bare server.

The bare grpc.aio server sends the same messages, byte for byte, at the same pace. Both run beside each other in
processes of their own and are measured in turns, in several rounds; the client is this process. Everything of ours is
in the figure: the counting engine, the hand-over to the loop, detokenising, the messages, and each request's intake.
"""

import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

import grpc

from benchmarks.grpc_servers import ReadyTimes, ServerProcess, server_process
from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import is_quick, median_ratio
from serve.protos.jaxinfer.v1 import generation_pb2 as pb

METHOD = "/jaxinfer.v1.GenerationService/GenerateStream"
ROUNDS, QUICK_ROUNDS = 7, 1
TOKENS = {1: 1024, 16: 512, 64: 512}
"""Streams to tokens each of them gets, in whole steps."""
FLOOR, GOAL = 2.0, 1.3

Received = dict[str, list[tuple[float, bytes]]]
"""Request id to its messages and when each arrived."""


@dataclass(slots=True)
class Costs:
    """Of one server at one number of streams, over all rounds: CPU microseconds a token, and latencies in seconds."""

    cpu: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        return statistics.quantiles(self.latency, n=1000)[round(share * 1000) - 1] * 1e3


def requests(num_streams: int, rng: random.Random) -> list[pb.GenerateRequest]:
    """Text prompts, as users send them."""
    tokens = TOKENS[num_streams]
    return [pb.GenerateRequest(request_id=f"{num_streams}-{number}", text=f"def function_{rng.randrange(10**6)}(",
                               sampling=pb.SamplingParams(max_tokens=tokens)) for number in range(num_streams)]


async def stream_all(address: str, messages: list[pb.GenerateRequest]) -> Received:
    """Runs all requests at once and keeps what arrives, unread: the client must not compete for the CPU."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(METHOD, request_serializer=pb.GenerateRequest.SerializeToString)

        async def one(message: pb.GenerateRequest) -> list[tuple[float, bytes]]:
            return [(time.monotonic(), raw) async for raw in call(message)]

        found = await asyncio.gather(*map(one, messages))
    return {message.request_id: arrived for message, arrived in zip(messages, found, strict=True)}


def measure(server: ServerProcess, messages: list[pb.GenerateRequest], costs: Costs) -> Received:
    """One round of one server."""
    server.ready_times()
    before = server.cpu_seconds()
    received = asyncio.run(stream_all(server.address, messages))
    seconds = server.cpu_seconds() - before
    tokens = sum(message.sampling.max_tokens for message in messages)
    costs.cpu.append(seconds / tokens * 1e6)
    costs.latency += latencies(server.ready_times(), received)
    return received


def latencies(ready: ReadyTimes, received: Received) -> list[float]:
    """Of every message, from when its last tokens were ready to its arrival. A late one may carry several steps'."""
    found: list[float] = []
    for request_id, arrived in received.items():
        num_tokens, times = 0, ready[request_id]
        total = sum(count_tokens(raw) for _, raw in arrived)
        for arrival, raw in arrived:
            num_tokens += count_tokens(raw)
            found.append(arrival - times[-(-num_tokens * len(times) // total) - 1])
    return found


def count_tokens(raw: bytes) -> int:
    return sum(len(delta.token_ids) for delta in pb.GenerateStreamResponse.FromString(raw).deltas)


def compare(ours: ServerProcess, bare: ServerProcess, num_streams: int, pair: tuple[Costs, Costs], seed: int) -> None:
    """One round: ours, then the bare server with the very messages that ours sent."""
    messages = requests(num_streams, random.Random(seed))
    received = measure(ours, messages, pair[0])
    bare.load(bodies(received))
    echoed = measure(bare, messages, pair[1])
    if bodies(echoed) != bodies(received):
        raise AssertionError("the two servers did not send the same messages")


def bodies(received: Received) -> dict[str, list[bytes]]:
    return {request_id: [raw for _, raw in arrived] for request_id, arrived in received.items()}


def results(num_streams: int, ours: Costs, bare: Costs) -> list[Result]:
    ratio = median_ratio(ours.cpu, bare.cpu)
    streams = f"{num_streams} stream{'s' if num_streams > 1 else ''}"
    return [
        Result(f"{streams}: server CPU a token, ours / bare", ratio, "x", FLOOR, GOAL),
        Result(f"{streams}: server CPU a token, ours", statistics.median(ours.cpu), "us"),
        Result(f"{streams}: server CPU a token, bare", statistics.median(bare.cpu), "us"),
        Result(f"{streams}: token ready to client, ours, median", ours.quantile(0.5), "ms"),
        Result(f"{streams}: token ready to client, bare, median", bare.quantile(0.5), "ms"),
        Result(f"{streams}: token ready to client, ours, p99", ours.quantile(0.99), "ms"),
        Result(f"{streams}: token ready to client, bare, p99", bare.quantile(0.99), "ms"),
    ]


def main() -> int:
    rounds = QUICK_ROUNDS if is_quick(__doc__) else ROUNDS
    pairs = {num_streams: (Costs(), Costs()) for num_streams in TOKENS}
    with server_process("ours") as ours, server_process("bare") as bare:
        for num_streams in TOKENS:
            compare(ours, bare, num_streams, (Costs(), Costs()), seed=0)  # warm-up
        for number in range(1, rounds + 1):
            for num_streams, pair in pairs.items():
                compare(ours, bare, num_streams, pair, number)
            print(f"round {number} of {rounds} done", file=sys.stderr, flush=True)
    found = [result for num_streams, pair in pairs.items() for result in results(num_streams, *pair)]
    report("grpc", found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
