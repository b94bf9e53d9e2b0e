"""Errors by class: the status code, messages that name field, limit and value; nothing unknown leaks; life goes on."""

import logging

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from serving import Served, eventually, serving

from jaxinfer.errors import EngineClosed, InvalidConfig, Overloaded, StepFailed
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc
from serve.server import ServerConfig

INVALID = grpc.StatusCode.INVALID_ARGUMENT


class PanicException(BaseException):
    """What a Rust library raises when it panics: no Exception."""


@pytest.fixture(scope="module")
def small():
    with serving(make_core(CountingEngine(pace=0.001), max_model_len=100)) as found:
        yield found


def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize(("options", "words"), [
    ({"temperature": float("nan")}, ["temperature", "[0, 2]", "nan"]),
    ({"temperature": -1.0}, ["temperature", "-1"]),
    ({"top_p": 0.0}, ["top_p", "(0, 1]", "0"]),
    ({"top_p": float("inf")}, ["top_p", "inf"]),
    ({"top_k": 300}, ["top_k", "257", "300"]),
    ({"min_p": 1.5}, ["min_p", "1.5"]),
    ({"n": 0}, ["n:", "[1, 16]", "0"]),
    ({"n": 17}, ["n:", "16", "17"]),
    ({"max_tokens": 0}, ["max_tokens", "1", "0"]),
    ({"max_tokens": 99}, ["max_tokens", "99", "100", "at most 98"]),
    ({"min_tokens": 6, "max_tokens": 5}, ["min_tokens", "5", "6"]),
    ({"logprobs": 21}, ["logprobs", "20", "21"]),
    ({"prompt_logprobs": -1}, ["prompt_logprobs", "-1"]),
    ({"stop": [""]}, ["stop", "empty"]),
    ({"stop": ["x"] * 17}, ["stop", "17", "16"]),
    ({"stop": "x" * 300}, ["stop", "300", "256"]),
    ({"stop_token_ids": [257]}, ["stop_token_ids", "257", "[0, 257)"]),
    ({"stop_token_ids": [5] * 17}, ["stop_token_ids", "17", "16"]),
    ({"allowed_token_ids": [5] * (2**20 + 1)}, ["allowed_token_ids", "1048577", "1048576"]),
    ({"stop": "a", "detokenize": False}, ["stop", "detokenize"]),
    ({"request_id": ""}, ["request_id", "empty"]),
    ({"request_id": "x" * 300}, ["request_id", "300", "256"]),
    ({"cache_salt": "x" * 300}, ["cache_salt", "300", "256"]),
])
def test_bad_fields(small: Served, options: dict, words: list[str]):
    for call in (small.client.generate, lambda *args, **kwargs: list(small.client.stream(*args, **kwargs))):
        code, text = refusal(lambda call=call: call("ab", **options))
        assert code is INVALID
        assert all(word in text for word in words), text
    assert not small.engine.rows


@pytest.mark.parametrize(("prompt", "words"), [
    ("", ["prompt", "empty"]),
    ([], ["prompt", "empty"]),
    ([5, 257], ["prompt", "257", "[0, 257)"]),
    ([-1], ["prompt", "-1"]),
    ("a" * 100, ["prompt", "100", "99"]),
    ("a" * 5000, ["prompt", "5000", "100"]),
    ([{"role": "user"}], ["chat.messages[0].content", "missing"]),
    ([{"content": "hi"}], ["chat.messages[0].role", "missing"]),
    ([{"role": "pirate", "content": "hi"}], ["role", "pirate"]),
])
def test_bad_prompts(small: Served, prompt, words: list[str]):
    code, text = refusal(lambda: small.client.generate(prompt))
    assert code is INVALID
    assert all(word in text for word in words), text
    assert small.client.generate("ab", max_tokens=1).text == "c"


def test_missing_prompts(small: Served):
    with grpc.insecure_channel(small.server.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        assert refusal(lambda: stub.Generate(pb.GenerateRequest())) == (
            INVALID, "prompt: is missing; set text or chat or token_ids")
        assert refusal(lambda: stub.Tokenize(pb.TokenizeRequest())) == (INVALID, "prompt: is missing; set text or chat")
        code, text = refusal(lambda: stub.Generate(pb.GenerateRequest(chat=pb.ChatPrompt())))
        assert code is INVALID and "chat.messages" in text


def test_ids_to_detokenize(small: Served):
    for ids in ([1, 257], [-3]):
        code, text = refusal(lambda ids=ids: small.client.detokenize(ids))
        assert code is INVALID and f"token_ids: token id {ids[-1]}" in text and "[0, 257)" in text


def test_what_no_request_could_hold_is_neither_tokenised_nor_detokenised(small: Served):
    assert small.client.detokenize([1] * 100)
    code, text = refusal(lambda: small.client.detokenize([1] * 101))
    assert code is INVALID and "token_ids: has 101 tokens; the limit is 100" in text
    code, text = refusal(lambda: small.client.tokenize("x" * 100_000))
    assert code is INVALID and "prompt: has 100000 characters" in text


def test_the_length_is_looked_at_before_the_ids(small: Served):
    code, text = refusal(lambda: small.client.generate([257] * 100, max_tokens=1))
    assert code is INVALID and "prompt: has 100 tokens" in text


def test_messages_of_a_chat_are_counted_before_they_are_read(small: Served):
    code, text = refusal(lambda: small.client.generate([{"role": "user", "content": "a"}] * 4097, max_tokens=1))
    assert code is INVALID and "chat.messages: has 4097 messages; the limit is 4096" in text


def test_without_a_tokenizer():
    with serving(make_core(CountingEngine(), with_tokenizer=False)) as served:
        for call in (lambda: served.client.generate("ab"), lambda: served.client.tokenize("ab"),
                     lambda: served.client.detokenize([1]),
                     lambda: served.client.generate([{"role": "user", "content": "hi"}])):
            code, text = refusal(call)
            assert code is grpc.StatusCode.FAILED_PRECONDITION and "no " in text


@pytest.mark.parametrize(("error", "code"), [
    (Overloaded("7 requests are waiting, the limit is 7; try again later"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineClosed("the engine is shutting down"), grpc.StatusCode.UNAVAILABLE),
])
def test_refused_by_the_engine(stepped: Served, error: Exception, code: grpc.StatusCode):
    stepped.engine.submit_error = error
    assert refusal(lambda: stepped.client.generate("ab")) == (code, str(error))
    assert refusal(lambda: list(stepped.client.stream("ab"))) == (code, str(error))
    bridge = stepped.server.served._bridge
    assert bridge is not None and bridge.num_streams == 0


@pytest.mark.parametrize("error", [StepFailed("3 device steps failed"), EngineClosed("the engine died")])
def test_given_up_by_the_engine(stepped: Served, error: Exception):
    stream = stepped.client.stream("ab", n=2, max_tokens=10)
    eventually(lambda: len(stepped.engine.rows) == 2)
    stepped.engine.step()
    stepped.engine.fail(error)
    assert refusal(lambda: list(stream)) == (grpc.StatusCode.UNAVAILABLE, str(error))
    assert stepped.engine.cancelled == []


def test_a_full_queue(stepped: Served):
    stepped.engine._max_waiting = 1
    stream = stepped.client.stream("ab")
    eventually(lambda: len(stepped.engine.rows) == 1)
    code, text = refusal(lambda: stepped.client.generate("ab"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "limit is 1" in text
    stream.cancel()


@pytest.mark.parametrize("error", [RuntimeError("secret /etc/passwd"), PanicException("secret"), KeyError("secret")])
def test_unknown_errors_do_not_leak(stepped: Served, error: BaseException, monkeypatch: pytest.MonkeyPatch,
                                    caplog: pytest.LogCaptureFixture):
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    assert stepped.core is not None
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(stepped.core.intake, "request", broken)
        code, text = refusal(lambda: stepped.client.generate("ab"))
    assert code is grpc.StatusCode.INTERNAL and "secret" not in text
    assert "secret" in caplog.text  # the operator sees it
    stepped.engine.tokens_per_step = 9
    stream = stepped.client.stream("ab", max_tokens=2)
    eventually(lambda: stepped.engine.rows)
    stepped.engine.step()
    assert "".join(delta.text for delta in stream) == "cd"


@pytest.mark.parametrize("error", [ValueError("secret"), PanicException("secret")])
def test_an_error_in_one_requests_text_hurts_nobody_else(stepped: Served, error: BaseException,
                                                         monkeypatch: pytest.MonkeyPatch):
    from jaxinfer.assembly import Assembler

    feed = Assembler.feed

    def sometimes(self: Assembler, chunk):
        if self.request.cache_salt == "cursed":
            raise error
        return feed(self, chunk)

    monkeypatch.setattr(Assembler, "feed", sometimes)
    good = stepped.client.stream("ab", max_tokens=3)
    bad = stepped.client.stream("ab", max_tokens=3, cache_salt="cursed", request_id="bad")
    eventually(lambda: len(stepped.engine.rows) == 2)
    stepped.engine.step()
    eventually(lambda: stepped.engine.cancelled == [("bad", None)])
    for _ in range(2):
        stepped.engine.step()
    code, text = refusal(lambda: list(bad))
    assert code is grpc.StatusCode.INTERNAL and "secret" not in text
    assert "".join(delta.text for delta in good) == "cde"


@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream"])
def test_messages_over_four_mebibytes_are_refused_by_grpc(small: Served, rpc: str):
    largest = request_of(4 * 1024 * 1024)
    with grpc.insecure_channel(small.server.address) as channel:
        call = channel.unary_stream(f"/jaxinfer.v1.GenerationService/{rpc}")  # of a single answer, too
        code, text = refusal(lambda: list(call(largest)))
        assert code is INVALID and text.startswith("prompt: "), text  # it has reached the service
        code, text = refusal(lambda: list(call(request_of(len(largest) + 1))))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "4194305 vs. 4194304" in text, text
    assert small.client.generate("ab", max_tokens=1).text == "c"


def request_of(num_bytes: int) -> bytes:
    """A request of exactly so many bytes, with a text that is far too long."""
    data = pb.GenerateRequest(text="a" * (num_bytes - 5)).SerializeToString()  # 1 for the tag, 4 for the length
    assert len(data) == num_bytes
    return data


def test_unknown_client_options(small: Served):
    with pytest.raises(TypeError, match="temprature"):
        small.client.generate("ab", temprature=1.0)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(("options", "words"), [
    ({"host": ""}, "host: must be .*, got ''"), ({"host": "unix"}, "host: must be .*, got 'unix'"),
    ({"port": 70_000}, "port: must be in"), ({"port": -1}, "port: must be in"),
    ({"drain_seconds": -1.0}, "drain_seconds: must be"), ({"drain_seconds": float("nan")}, "drain_seconds: must be"),
])
def test_bad_server_settings(options: dict, words: str):
    with pytest.raises(InvalidConfig, match=words):
        ServerConfig(**options)
