"""Flags of `jaxinfer serve` that bound bytes, exact to the byte over a real connection."""

from typing import Any

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from serving import Served, serving

from jaxinfer.cli import make_parser
from jaxinfer.options import SERVER_OPTIONS, given
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def served_with(*flags: str) -> Any:
    """As `jaxinfer serve` reads the flags."""
    chosen = given(make_parser().parse_args(["serve", *flags]), SERVER_OPTIONS)
    return serving(make_core(CountingEngine(pace=0.001)), **chosen)


def message_of(size: int) -> pb.TokenizeRequest:
    found = pb.TokenizeRequest(text="a" * (size - 3))
    assert found.ByteSize() == size
    return found


def test_a_request_of_so_many_bytes():
    with served_with("--max-request-bytes", "1000") as served, grpc.insecure_channel(served.server.address) as channel:
        tokenize = pb_grpc.GenerationServiceStub(channel).Tokenize
        for size in (999, 1000):
            assert len(tokenize(message_of(size)).token_ids) == size - 3
        with pytest.raises(grpc.RpcError) as caught:
            tokenize(message_of(1001))
        assert caught.value.code() is EXHAUSTED and "1000" in caught.value.details()


def most_metadata(served: Served) -> int:
    """Bytes of the longest value that is let in: the bound less what gRPC sends and counts itself."""
    with grpc.insecure_channel(served.server.address) as channel:
        load = pb_grpc.GenerationServiceStub(channel).GetLoad

        def is_let_in(size: int) -> bool:
            try:
                return bool(load(pb.GetLoadRequest(), metadata=(("x", "y" * size),)).pages_total)
            except grpc.RpcError as error:
                assert error.code() is EXHAUSTED  # type: ignore[attr-defined]
                return False

        low, high = 1, 8192
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if is_let_in(middle) else (low, middle)
        return low


def test_metadata_of_so_many_bytes():
    found = []
    for limit in (4095, 4096, 4097):
        with served_with("--max-metadata-bytes", str(limit)) as served:
            found.append(most_metadata(served))
    assert found == [found[1] - 1, found[1], found[1] + 1]
    assert 3500 < found[1] < 4096
