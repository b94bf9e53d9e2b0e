"""Raw bytes over a real channel: what is no message is the client's fault, and the server goes on."""

import logging

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from serving import Served

from serve.protos.jaxinfer.v1 import generation_pb2 as pb

OURS = "/jaxinfer.v1.GenerationService"
HEALTH, REFLECTION = "/grpc.health.v1.Health", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
NOT_UTF8 = b"\x02\xff\xfe"
MALFORMED = {
    "garbage": b"\xff\xff\xff",
    "truncated": b"\x12\x10ab",  # a string of 16 bytes has 2
    "nested too deeply": b"\x13" * 50_000,  # groups that only begin
}
STRINGS = [
    (f"{OURS}/Generate", b"\x12" + NOT_UTF8), (f"{OURS}/Generate", b"\x2a\x04\x3a" + NOT_UTF8),  # text, sampling.stop
    (f"{OURS}/GenerateStream", b"\x0a" + NOT_UTF8), (f"{OURS}/Tokenize", b"\x0a" + NOT_UTF8),
    (f"{HEALTH}/Check", b"\x0a" + NOT_UTF8), (f"{HEALTH}/Watch", b"\x0a" + NOT_UTF8), (REFLECTION, b"\x22" + NOT_UTF8),
]
METHODS = [f"{OURS}/{one.name}" for one in pb.DESCRIPTOR.services_by_name["GenerationService"].methods]
METHODS += [f"{HEALTH}/Check", f"{HEALTH}/Watch", REFLECTION]
CASES = [(method, data) for method in METHODS for data in MALFORMED.values()] + STRINGS


@pytest.mark.parametrize(("method", "data"), CASES,
                         ids=[f"{method}-{number}" for number, (method, _) in enumerate(CASES)])
def test_bytes_that_are_no_message(served: Served, method: str, data: bytes, caplog: pytest.LogCaptureFixture):
    with grpc.insecure_channel(served.server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            # As streams of one: on the wire that is the same as a single message.
            list(channel.stream_stream(method)(iter([data]), timeout=5))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == (
            f"request: the {len(data)} bytes sent to {method} are malformed protobuf, or hold a string that is not "
            "UTF-8; make them with the stubs of the service's .proto")
    assert served.client.generate("ab", max_tokens=2).text == "cd"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_each_kind_of_call_works_with_identity_serializers(served: Served):
    request = pb.GenerateRequest(text="ab", sampling=pb.SamplingParams(max_tokens=2)).SerializeToString()
    listing = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    with grpc.insecure_channel(served.server.address) as channel:
        whole = pb.GenerateResponse.FromString(channel.unary_unary(f"{OURS}/Generate")(request))
        pieces = map(pb.GenerateStreamResponse.FromString, channel.unary_stream(f"{OURS}/GenerateStream")(request))
        assert whole.completions[0].text == "".join(one.deltas[0].text for one in pieces) == "cd"
        watch = channel.unary_stream(f"{HEALTH}/Watch")(b"")
        assert health_pb2.HealthCheckResponse.FromString(next(watch)).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        assert len(list(channel.stream_stream(REFLECTION)(iter([listing, listing])))) == 2


def test_a_stream_of_requests_is_answered_up_to_the_bad_one(served: Served):
    listing = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    with grpc.insecure_channel(served.server.address) as channel:
        answers = channel.stream_stream(REFLECTION)(iter([listing, b"\xff"]))
        assert next(answers)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_methods_stay_unknown(served: Served):
    with grpc.insecure_channel(served.server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"{OURS}/Guess")(b"\xff")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
