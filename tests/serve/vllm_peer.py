"""A client of `vllm.grpc.engine`, with the stubs of smg-grpc-proto."""

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc


class Peer:
    """The package's stub on one channel. Prompts are texts whose bytes are token ids."""

    def __init__(self, channel: grpc.Channel):
        self.stub = pb_grpc.VllmEngineStub(channel)

    def start(self, prompt: str = "ab", *, request_id: str = "r", stream: bool = True, **sampling: Any) -> Any:
        return self.stub.Generate(pb.GenerateRequest(
            request_id=request_id, tokenized=pb.TokenizedInput(input_ids=prompt.encode()), stream=stream,
            sampling_params=pb.SamplingParams(**sampling)), timeout=20)

    def chunks(self, prompt: str = "ab", **options: Any) -> tuple[list[Any], list[Any]]:
        """A stream's chunks and its completes, which come last."""
        messages = list(self.start(prompt, **options))
        kinds = [message.WhichOneof("response") for message in messages]
        assert set(kinds) <= {"chunk", "complete"}
        return ([one.chunk for one in messages if one.HasField("chunk")],
                [one.complete for one in messages if one.HasField("complete")])

    def whole(self, prompt: str = "ab", **options: Any) -> list[Any]:
        messages = list(self.start(prompt, stream=False, **options))
        assert all(message.HasField("complete") for message in messages)
        return [message.complete for message in messages]

    def abort(self, *request_ids: str) -> None:
        assert self.stub.Abort(pb.AbortRequest(request_ids=request_ids)) == pb.AbortResponse()


@contextlib.contextmanager
def connected(address: str) -> Iterator[Peer]:
    with grpc.insecure_channel(address) as channel:
        yield Peer(channel)


def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    return caught.value.code(), caught.value.details()
