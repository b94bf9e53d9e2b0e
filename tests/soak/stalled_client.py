"""A client that reads nothing: stalled_client.py ADDRESS STREAMS TOKENS DEADLINE begins streams, says so, and waits.

Told to go on (a line on standard input) it reads all to their ends, and prints how many ended with which status.
"""

import sys
from collections import Counter

import grpc

from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc

SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 16 * 1024), ("grpc.http2.bdp_probe", 0),
                ("grpc.max_receive_message_length", -1))
"""It stops the server soon, and holds little itself."""


def main() -> None:
    address, streams, tokens, deadline = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    with grpc.insecure_channel(address, options=SMALL_WINDOW) as channel:
        asked = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=tokens, ignore_eos=True))
        stub = pb_grpc.GenerationServiceStub(channel)
        calls = [stub.GenerateStream(asked, timeout=deadline) for _ in range(streams)]
        print("begun", flush=True)
        sys.stdin.readline()
        print(dict(Counter(map(end_of, calls))), flush=True)


def end_of(call: grpc.UnaryStreamMultiCallable) -> str:
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return "STALLED" if "nothing of this stream was read" in (error.details() or "") else error.code().name
    return "OK"


if __name__ == "__main__":
    main()
