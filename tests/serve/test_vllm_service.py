"""`vllm.grpc.engine.VllmEngine` over a real channel, with its own stubs, against the counting engine."""

import logging
from typing import Any

import grpc
import pytest
from counting_engine import EOS, VOCAB_SIZE
from serving import Served, eventually

from jaxinfer.errors import EngineClosed, Overloaded, StepFailed
from jaxinfer.types import SamplingParams, StructuredOutput

pytest.importorskip("smg_grpc_proto", reason="needs smg-grpc-proto")

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from vllm_peer import Peer, refusal

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


# ---- what is said


def test_chunks_are_deltas_and_the_end_is_a_complete(stepped: Served, slow: Peer):
    call = slow.start(max_tokens=9)
    eventually(lambda: len(stepped.engine.rows) == 1)
    stepped.engine.tokens_per_step, chunks = 3, []
    for _ in range(3):
        stepped.engine.step()
        chunks.append(next(call).chunk)  # read before the next: what waits would be joined
    (complete,) = (message.complete for message in call)
    assert [len(chunk.token_ids) for chunk in chunks] == [3, 3, 3]
    assert bytes(id for chunk in chunks for id in chunk.token_ids) == b"cdefghijk"
    assert all(chunk.completion_tokens == len(chunk.token_ids) > 0 for chunk in chunks)
    assert {(one.prompt_tokens, one.cached_tokens) for one in (*chunks, complete)} == {(2, 1)}
    assert (complete.finish_reason, complete.completion_tokens) == ("length", 9)
    assert complete.WhichOneof("matched_stop") is None


def test_without_streaming_there_is_one_message_a_sample(peer: Peer):
    found = peer.whole(n=3, max_tokens=4)
    assert [one.index for one in found] == [0, 1, 2]
    for one in found:
        assert bytes(one.output_ids) == b"cdef"
        assert (one.finish_reason, one.completion_tokens, one.prompt_tokens, one.cached_tokens) == ("length", 4, 2, 1)


def test_a_text_is_tokenised_here(served: Served):
    with grpc.insecure_channel(served.server.address) as channel:
        request = pb.GenerateRequest(text="ab", sampling_params=pb.SamplingParams(max_tokens=2))
        (message,) = pb_grpc.VllmEngineStub(channel).Generate(request)
    assert bytes(message.complete.output_ids) == b"cd"


def test_samples_have_chunks_and_ends_of_their_own(peer: Peer):
    chunks, completes = peer.chunks(n=3, max_tokens=6)
    for index in range(3):
        assert bytes(id for chunk in chunks if chunk.index == index for id in chunk.token_ids) == b"cdefgh"
    assert sorted((one.index, one.finish_reason, one.completion_tokens) for one in completes) == [
        (index, "length", 6) for index in range(3)]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("sampling", "ids", "reason", "matched"), [
    ({"stop": ["f"]}, b"cdef", "stop", ("matched_stop_str", "f")),
    ({"stop": ["xyz", "ef"]}, b"cdef", "stop", ("matched_stop_str", "ef")),
    ({"stop_token_ids": [ord("e")]}, b"cde", "stop", ("matched_token_id", ord("e"))),
    ({"stop_token_ids": [ord("e")], "min_tokens": 1}, b"cde", "stop", ("matched_token_id", ord("e"))),
    ({"max_tokens": 2}, b"cd", "length", None),
])
def test_finish_reasons(peer: Peer, stream: bool, sampling: dict, ids: bytes, reason: str, matched: tuple | None):
    options = {"max_tokens": 50} | sampling
    if stream:
        chunks, (end,) = peer.chunks(**options)
        assert bytes(id for chunk in chunks for id in chunk.token_ids) == ids
    else:
        (end,) = peer.whole(**options)
        assert bytes(end.output_ids) == ids
    assert (end.finish_reason, end.completion_tokens) == (reason, len(ids))
    kind = end.WhichOneof("matched_stop")
    assert (kind and (kind, getattr(end, kind))) == matched


def test_end_of_sequence(served: Served):
    with grpc.insecure_channel(served.server.address) as channel:
        stub = pb_grpc.VllmEngineStub(channel)
        for ignore_eos, reason in ((False, "stop"), (True, "length")):
            (message,) = stub.Generate(pb.GenerateRequest(
                tokenized=pb.TokenizedInput(input_ids=[254]),
                sampling_params=pb.SamplingParams(max_tokens=4, ignore_eos=ignore_eos)))
            assert message.complete.finish_reason == reason
            assert list(message.complete.output_ids) == ([255, EOS] if not ignore_eos else [255, EOS, 0, 1])
            assert message.complete.WhichOneof("matched_stop") is None


def test_a_stop_string_cancels_the_row(stepped: Served, slow: Peer):
    stepped.engine.tokens_per_step = 4
    call = slow.start(max_tokens=100, stop=["e"], request_id="s")
    eventually(lambda: stepped.engine.rows)
    stepped.engine.step()
    chunk, complete = list(call)
    assert bytes(chunk.chunk.token_ids) == b"cde" and complete.complete.matched_stop_str == "e"
    assert stepped.engine.cancelled == [("s", 0)] and not stepped.engine.rows


def test_logprobs(peer: Peer):
    chunks, _ = peer.chunks(max_tokens=4, logprobs=3)
    (complete,) = peer.whole(max_tokens=4, logprobs=3)
    parts = [chunk.output_logprobs for chunk in chunks]
    assert bytes(id for part in parts for id in part.token_ids) == bytes(complete.output_logprobs.token_ids) == b"cdef"
    assert [value for part in parts for value in part.token_logprobs] == [-1.5] * 4
    assert list(complete.output_logprobs.token_logprobs) == [-1.5] * 4
    first = complete.output_logprobs.top_logprobs[0]
    assert list(first.token_ids) == list(b"dcf") and list(first.values) == [-0.5, -1.5, -2.5]
    assert len(complete.output_logprobs.top_logprobs) == 4
    (plain,) = peer.whole(max_tokens=4, logprobs=0)
    assert len(plain.output_logprobs.token_logprobs) == 4 and not plain.output_logprobs.top_logprobs
    (none,) = peer.whole(max_tokens=4)
    assert not none.HasField("output_logprobs") and not none.HasField("input_logprobs")


def test_prompt_logprobs_come_with_the_first_chunk(peer: Peer):
    chunks, (end,) = peer.chunks("abc", max_tokens=6, prompt_logprobs=1)
    (whole,) = peer.whole("abc", max_tokens=6, prompt_logprobs=1)
    assert [chunk.HasField("input_logprobs") for chunk in chunks] == [True, *[False] * (len(chunks) - 1)]
    assert not end.HasField("input_logprobs")
    found = chunks[0].input_logprobs
    assert found == whole.input_logprobs
    assert list(found.token_ids) == list(b"abc")
    assert [one.value if one.HasField("value") else None for one in found.token_logprobs] == [None, -1.5, -1.5]
    assert [list(one.token_ids) for one in found.top_logprobs] == [[], [ord("c")], [ord("d")]]


# ---- what is asked for


def params_of(stepped: Served, call: Any) -> tuple[SamplingParams, int]:
    """The parameters of the request that arrives, and its length."""
    eventually(lambda: stepped.engine.rows)
    request = next(iter(stepped.engine.rows.values())).request
    call.cancel()
    eventually(lambda: not stepped.engine.rows)
    return request.params, request.max_tokens


def test_zero_means_default(stepped: Served, slow: Peer):
    """vLLM's default also where the model wishes for another: this one's temperature is 0.7."""
    params, room = params_of(stepped, slow.start())
    assert params == SamplingParams(temperature=1.0, max_tokens=None, detokenize=False, skip_special_tokens=False)
    assert room == 300_000 - 2
    params, room = params_of(stepped, slow.start(temperature=0.0, max_tokens=7))
    assert (params.temperature, room) == (0.0, 7)


def test_fields_arrive(stepped: Served, slow: Peer):
    sampling = {"temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "frequency_penalty": -0.5,
                "presence_penalty": 1.5, "repetition_penalty": 1.25, "max_tokens": 9, "min_tokens": 2,
                "stop_token_ids": (7,), "ignore_eos": True, "n": 2, "logprobs": 1, "prompt_logprobs": 0, "seed": -5,
                "logit_bias": {97: 2.5}}  # fmt: skip
    params, _ = params_of(stepped, slow.start(**sampling))
    wanted = sampling | {"logit_bias": ((97, 2.5),), "detokenize": False, "skip_special_tokens": False}
    assert params == SamplingParams(**wanted)
    params, _ = params_of(stepped, slow.start(stop=["x"], include_stop_str_in_output=True, skip_special_tokens=True))
    assert (params.stop, params.include_stop_str_in_output, params.detokenize) == (("x",), True, True)
    assert params.skip_special_tokens


@pytest.mark.parametrize(("constraint", "wanted"), [
    ({"json_schema": '{"type": "null"}'}, StructuredOutput(json='{"type":"null"}')),
    ({"json_object": True}, StructuredOutput(json_object=True)),
    ({"regex": "[0-9]+"}, StructuredOutput(regex="[0-9]+")),
    ({"grammar": 'start: "a" | "b"'}, StructuredOutput(grammar='start: "a" | "b"')),
    ({"choice": pb.ChoiceConstraint(choices=["yes", "no"])}, StructuredOutput(choice=("yes", "no"))),
    ({"json_object": False}, None),
])
def test_constraints_arrive(stepped: Served, slow: Peer, constraint: dict, wanted: StructuredOutput | None):
    params, _ = params_of(stepped, slow.start(max_tokens=5, **constraint))
    assert params.structured_outputs == wanted


@pytest.mark.parametrize(("sampling", "words"), [
    ({"temperature": -1.0}, ["temperature", "[0, 2]", "-1"]),
    ({"top_p": 1.5}, ["top_p", "(0, 1]", "1.5"]),
    ({"n": 17}, ["n:", "16", "17"]),
    ({"max_tokens": 0}, ["max_tokens", "0"]),
    ({"max_tokens": 400_000}, ["max_tokens", "400000", "300000"]),
    ({"logprobs": -1}, ["logprobs", "-1"]),
    ({"stop": ["x"] * 17}, ["stop", "17", "16"]),
    ({"stop_token_ids": [2**32 - 1]}, ["stop_token_ids", "4294967295"]),
    ({"logit_bias": {-1: 1.0}}, ["logit_bias", "-1"]),
    ({"truncate_prompt_tokens": 5}, ["truncate_prompt_tokens", "never cut"]),
    ({"structural_tag": "{}"}, ["structural_tag", "json_schema", "choice"]),
    ({"json_schema": "{"}, ["json", "not valid JSON"]),
    ({"regex": "(a"}, ["regex", "cannot be compiled"]),
    ({"json_object": True, "ignore_eos": True}, ["structured_outputs", "ignore_eos"]),
])
def test_bad_fields(peer: Peer, sampling: dict, words: list[str]):
    for stream in (True, False):
        code, text = refusal(lambda stream=stream: peer.start(stream=stream, **sampling))
        assert code is INVALID
        assert all(word in text for word in words), text


@pytest.mark.parametrize(("fields", "words"), [
    ({}, ["input", "tokenized or text"]),
    ({"text": ""}, ["prompt", "empty"]),
    ({"tokenized": pb.TokenizedInput(input_ids=[VOCAB_SIZE])}, ["prompt", "257"]),
    ({"text": "a", "request_id": "x" * 300}, ["request_id", "300"]),
    ({"text": "a", "kv_transfer_params": pb.KvTransferParams(remote_host="h")}, ["kv_transfer_params"]),
    ({"text": "a", "kv_transfer_params_json": "{}"}, ["kv_transfer_params_json"]),
    ({"text": "a", "mm_inputs": pb.MultimodalInputs()}, ["mm_inputs", "text only"]),
    ({"text": "a", "media_refs": pb.MediaRefs()}, ["media_refs", "text only"]),
    ({"text": "a", "data_parallel_rank": 1}, ["data_parallel_rank", "1"]),
])
def test_bad_requests(peer: Peer, fields: dict, words: list[str]):
    code, text = refusal(lambda: peer.stub.Generate(pb.GenerateRequest(**fields)))
    assert code is INVALID
    assert all(word in text for word in words), text


# ---- errors


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("error", "code"), [
    (Overloaded("7 requests are waiting, the limit is 7; try again later"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineClosed("the engine is shutting down"), UNAVAILABLE),
])
def test_refused_by_the_engine(stepped: Served, slow: Peer, stream: bool, error: Exception, code: grpc.StatusCode):
    stepped.engine.submit_error = error
    assert refusal(lambda: slow.start(stream=stream)) == (code, str(error))


def test_given_up_by_the_engine(stepped: Served, slow: Peer):
    call = slow.start(max_tokens=10)
    eventually(lambda: stepped.engine.rows)
    stepped.engine.step()
    assert bytes(next(call).chunk.token_ids) == b"c"
    stepped.engine.fail(StepFailed("3 device steps failed"))
    assert refusal(lambda: call) == (UNAVAILABLE, "3 device steps failed")


def test_unknown_errors_do_not_leak(stepped: Served, slow: Peer, monkeypatch: pytest.MonkeyPatch,
                                    caplog: pytest.LogCaptureFixture):
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret")

    assert stepped.core is not None
    with caplog.at_level(logging.ERROR):
        monkeypatch.setattr(stepped.core.intake, "request", broken)
        code, text = refusal(slow.start)
    assert code is grpc.StatusCode.INTERNAL and "secret" not in text and "secret" in caplog.text


@pytest.mark.parametrize("name", ["Embed", "FlushCache", "StartProfile", "StopProfile", "SubscribeKvEvents"])
def test_what_is_not_offered(served: Served, name: str, caplog: pytest.LogCaptureFixture):
    method = pb.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name[name]
    with grpc.insecure_channel(served.server.address) as channel, caplog.at_level(logging.ERROR):
        path = f"/vllm.grpc.engine.VllmEngine/{name}"
        call = channel.unary_stream(path) if method.server_streaming else channel.unary_unary(path)
        answer = (lambda: call(b"")) if method.server_streaming else (lambda: [call(b"")])
        assert refusal(answer) == (grpc.StatusCode.UNIMPLEMENTED, "this server does not offer it")
    assert not caplog.records


def test_every_method_is_one_that_we_know():
    """What is in neither list would be answered by the generated default, which logs a traceback."""
    from serve.vllm_service import VllmService

    names = {method.name for method in pb.DESCRIPTOR.services_by_name["VllmEngine"].methods}
    assert names == {name for name in vars(VllmService) if name[0].isupper()}


def test_malformed_bytes(served: Served):
    with grpc.insecure_channel(served.server.address) as channel:
        call = channel.unary_stream("/vllm.grpc.engine.VllmEngine/Generate")
        code, text = refusal(lambda: call(b"\xff\xff"))
    assert code is INVALID and "malformed" in text
