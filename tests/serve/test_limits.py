"""What a connection, a call and the queue may cost, at each limit and one beyond it."""

import time
from typing import Any

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from paged_engine import held, paged_core
from serving import eventually, serving

from jaxinfer.core import Core
from jaxinfer.errors import InvalidConfig, OutOfMemory, Overloaded
from jaxinfer.fault_points import failing
from jaxinfer.types import SamplingParams
from serve import retry_hint
from serve.client import Client
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc
from serve.server import ServerConfig

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
RETRYING = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.01s",
    "maxBackoff": "0.01s", "backoffMultiplier": 1, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}"""


def refusal(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def is_full(core: Core) -> bool:
    try:
        core.engine.check_room(1)
    except Overloaded:
        return True
    return False


def prompt(length: int) -> list[int]:
    return [1] * length


def test_the_queue_is_bounded_in_tokens_too():
    core = paged_core(max_waiting_tokens=100)
    with serving(core) as served, held(core):
        first = served.client.stream(prompt(60), max_tokens=1)
        eventually(lambda: served.server.served.calls.num_running == 1)
        full = served.client.stream(prompt(20), max_tokens=1, n=2)
        eventually(lambda: served.server.served.calls.num_running == 2)
        error = refusal(lambda: served.client.generate(prompt(1), max_tokens=1))
        assert error.code() is EXHAUSTED
        assert all(word in error.details() for word in ("100 prompt tokens", "max_waiting_tokens", "try again later"))
        full.cancel()
        first.cancel()


def test_what_waits_no_more_makes_room_again():
    core = paged_core(max_waiting_tokens=100)
    with serving(core) as served:
        for _ in range(3):  # ended ones, cancelled ones
            assert served.client.generate(prompt(90), max_tokens=2).token_ids
            with held(core):
                cancelled = served.client.stream(prompt(90), max_tokens=2)
                eventually(lambda: served.server.served.calls.num_running == 1)
                cancelled.cancel()
                eventually(lambda: served.server.served.calls.num_running == 0)
            core.engine.run(lambda engine: None)  # behind the cancel
        running = served.client.stream(prompt(100), max_tokens=100)
        next(iter(running))  # it has a token: it waits no more, though it runs
        assert served.client.generate(prompt(100), max_tokens=2).token_ids
        running.cancel()


def test_a_prompt_beyond_the_bound_may_wait_alone():
    core = paged_core(max_waiting_tokens=10)
    with serving(core) as served, held(core):
        alone = served.client.stream(prompt(200), max_tokens=1)
        eventually(lambda: served.server.served.calls.num_running == 1)
        assert refusal(lambda: served.client.generate(prompt(1), max_tokens=1)).code() is EXHAUSTED
        alone.cancel()


def test_what_a_full_queue_refuses_is_not_even_read():
    """No text is tokenised, no chat rendered and no grammar compiled for it."""
    core = paged_core(max_waiting=1)
    with serving(core) as served, held(core):
        first = served.client.stream(prompt(3), max_tokens=1)
        eventually(lambda: is_full(core))
        with failing("intake", RuntimeError("it was read")) as fault:
            for wanted in (None, {"regex": "a+"}):
                chat = served.client.stream([{"role": "user", "content": "a"}], max_tokens=1, structured_outputs=wanted)
                assert refusal(lambda: list(chat)).code() is EXHAUSTED  # noqa: B023 (called at once)
        assert fault.passes == 0
        first.cancel()


def test_a_full_queue_behind_a_hang_is_no_reason_to_try_again():
    """Waiting does not help: the status is that of every other call."""
    core = paged_core(max_waiting=1)
    with serving(core) as served, held(core):
        first = served.client.stream(prompt(3), max_tokens=1)
        eventually(lambda: is_full(core))
        served.call(served.server._suspend("the engine hangs"))
        error = refusal(lambda: served.client.generate(prompt(1), max_tokens=1))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and "the engine hangs" in error.details()
        served.call(served.server._suspend(None))
        first.cancel()


# ---- the hint


def test_a_refused_client_is_told_when_to_come_back():
    engine = CountingEngine(pace=0.001)
    with serving(make_core(engine)) as served:
        engine.submit_error = Overloaded("full")
        for call in (lambda: served.client.generate("a"), lambda: list(served.client.stream("a"))):
            (hint,) = [value for key, value in refusal(call).trailing_metadata() if key == retry_hint.KEY]
            assert retry_hint.SHORTEST <= int(hint) <= retry_hint.LONGEST


def test_grpc_itself_obeys_the_hint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retry_hint, "SHORTEST", 300)
    monkeypatch.setattr(retry_hint, "LONGEST", 300)
    engine = CountingEngine(pace=0.001)
    with serving(make_core(engine)) as served, \
            grpc.insecure_channel(served.server.address, options=(("grpc.service_config", RETRYING),)) as channel:
        asked: list[float] = []

        def full_once(num_samples: int) -> None:
            asked.append(time.monotonic())
            if len(asked) == 1:
                raise Overloaded("full")

        engine.check_room = full_once  # type: ignore[method-assign]
        answer = pb_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(text="a"), timeout=10)
        assert answer.completions[0].text
        assert asked[1] - asked[0] >= 0.29, "not the policy's own hundredth of a second"


def test_only_what_waiting_helps_has_a_hint():
    assert retry_hint.retry_hint(Overloaded("full"))
    assert retry_hint.retry_hint(OutOfMemory("never")) == retry_hint.retry_hint(ValueError()) == ()


# ---- a connection and a call


def test_metadata():
    with serving(make_core(), max_metadata_bytes=4096) as served, \
            grpc.insecure_channel(served.server.address) as channel:
        load = pb_grpc.GenerationServiceStub(channel).GetLoad
        assert load(pb.GetLoadRequest(), metadata=(("x", "y" * 3000),)).pages_total
        for size in (4096, 100_000):
            error = refusal(lambda size=size: load(pb.GetLoadRequest(), metadata=(("x", "y" * size),)))
            assert error.code() is EXHAUSTED


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_the_size_of_a_request(limit: int):
    with serving(make_core(), max_request_bytes=limit) as served:
        text = "a" * (limit - 10)
        assert len(served.client.tokenize(text)) == len(text)
        error = refusal(lambda: served.client.tokenize(text + "a" * 10))
        assert error.code() is EXHAUSTED and str(limit) in error.details()


def test_streams_of_a_connection():
    engine = CountingEngine()
    with serving(make_core(engine), max_streams=2) as served:
        streams = [served.client.stream("a", max_tokens=3, request_id=str(index)) for index in range(3)]
        eventually(lambda: len(engine.rows) == 2)
        with Client(served.server.address) as other:  # the same address: gRPC shares connections of equal channels
            held_back = refusal(lambda: other.load(timeout=0.3))
        assert held_back.code() is grpc.StatusCode.DEADLINE_EXCEEDED and len(engine.rows) == 2
        streams[0].cancel()
        eventually(lambda: any(id.startswith("2/") for id, _ in engine.rows))
        for stream in streams[1:]:
            stream.cancel()


def test_calls_of_all_connections():
    engine = CountingEngine()
    with serving(make_core(engine), max_calls=2) as served:
        streams = [served.client.stream("a", max_tokens=3) for _ in range(2)]
        eventually(lambda: len(engine.rows) == 2)
        error = refusal(served.client.load)
        assert error.code() is EXHAUSTED and "the limit is 2" in error.details()
        assert retry_hint.KEY in dict(error.trailing_metadata())
        served.client.wait_ready(1)  # health answers all the same
        streams[0].cancel()
        eventually(lambda: len(engine.rows) == 1)
        engine.step()
        engine.step()
        engine.step()
        assert "".join(delta.text for delta in streams[1]) == "bcd"
        eventually(lambda: answers(served.client))


def answers(client: Client) -> bool:
    try:
        return client.load().num_running == 0
    except grpc.RpcError:
        return False


def test_the_defaults_that_are_shipped():
    config = ServerConfig()
    assert (config.max_metadata_bytes, config.max_request_bytes) == (16_384, 4_194_304)
    assert (config.max_calls, config.stall_timeout) == (8192, 60)


@pytest.mark.parametrize(("settings", "streams"), [
    ({}, 8192 + 1024), ({"max_calls": 10}, 1034), ({"max_calls": 2**31 - 1}, 2**31 - 1),
    ({"max_streams": 256}, 256), ({"max_streams": 20, "max_calls": 10}, 20),
])
def test_a_connection_may_run_every_call_unless_told_otherwise(settings: dict, streams: int):
    """A client holds back what is over a connection's limit: then nothing could be refused, and no probe answered."""
    assert dict(ServerConfig(**settings).channel_options())["grpc.max_concurrent_streams"] == streams


def test_what_is_too_much_on_one_connection_is_refused_and_not_held_back():
    """More calls at once than the 256 that HTTP/2 servers usually allow a connection."""
    engine = CountingEngine(max_waiting=270)
    with serving(make_core(engine)) as served:
        streams = [served.client.stream("a", max_tokens=3) for _ in range(300)]
        eventually(lambda: len(engine.rows) == 270)
        eventually(lambda: served.server.served.calls.ended["RESOURCE_EXHAUSTED"] == 30)
        served.client.wait_ready(1)
        for stream in streams:
            stream.cancel()


@pytest.mark.parametrize(("options", "words"), [
    ({"stall_timeout": 0.0}, "stall_timeout: must be over 0"), ({"stall_timeout": float("inf")}, "stall_timeout"),
    ({"stall_timeout": float("nan")}, "stall_timeout"), ({"max_streams": 0}, "max_streams: must be in"),
    ({"max_metadata_bytes": -1}, "max_metadata_bytes: must be in"),
    ({"max_request_bytes": 2**31}, "max_request_bytes: must be in"),
])
def test_settings_out_of_range(options: dict, words: str):
    with pytest.raises(InvalidConfig, match=words):
        ServerConfig(**options)


# ---- a request: the core's validator, over the wire


@pytest.mark.parametrize(("field", "most", "over"), [
    ("n", 16, 17), ("stop", ["s" * 256] * 16, ["s"] * 17), ("stop", ["s" * 256], ["s" * 257]), ("logprobs", 20, 21),
    ("logit_bias", dict.fromkeys(range(257), 1.0), dict.fromkeys(range(301), 1.0)),
    ("bad_words", ["w"] * 300, ["w"] * 301), ("temperature", 2.0, 2.1), ("top_k", 257, 258), ("seed", 2**63 - 1, None),
    ("presence_penalty", -2.0, -2.1),
])
def test_fields_at_their_limit_and_beyond(field: str, most: Any, over: Any):
    with serving(make_core()) as served:
        assert served.client.generate("a", max_tokens=1, **{field: most}).finish_reason
        if over is not None:
            error = refusal(lambda: served.client.generate("a", max_tokens=1, **{field: over}))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and error.details().startswith(f"{field}: ")
    assert field in SamplingParams.__dataclass_fields__
