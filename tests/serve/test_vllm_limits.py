"""What protects the service holds for gateways too: tokens, tenants, stalled readers, and refusals with a hint."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from paged_engine import PAGE_SIZE, held, paged_core
from serving import Served, eventually, serving

pytest.importorskip("smg_grpc_proto", reason="needs smg-grpc-proto")

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from test_stalls import SMALL_WINDOW

from serve import retry_hint
from serve.protos.jaxinfer.v1 import generation_pb2 as native_pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as native_grpc

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef0"
PROMPT = list(range(5 * PAGE_SIZE))
HIT = 4 * PAGE_SIZE


def error_of(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    return caught.value


def generate(channel: grpc.Channel, prompt: list[int], token: str | None = None, *, stream: bool = True,
             **sampling: Any) -> Any:
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    return pb_grpc.VllmEngineStub(channel).Generate(pb.GenerateRequest(
        request_id="r", tokenized=pb.TokenizedInput(input_ids=prompt), stream=stream,
        sampling_params=pb.SamplingParams(**sampling)), metadata=metadata, timeout=30)


# ---- readers


def test_a_stalled_stream_ends_and_frees_its_row(caplog: pytest.LogCaptureFixture):
    core = make_core(CountingEngine(tokens_per_step=20, pace=0.005))
    with serving(core, stall_timeout=0.5) as served, \
            grpc.insecure_channel(served.server.address, options=SMALL_WINDOW) as channel, \
            grpc.insecure_channel(served.server.address) as other:
        stalled = generate(channel, [97], max_tokens=100_000, ignore_eos=True, logprobs=20)
        next(stalled)
        eventually(lambda: ("r", None) in served.engine.cancelled, timeout=10)
        assert len(list(generate(other, [97], max_tokens=3))) >= 2, "nobody else notices"
        error = error_of(lambda: stalled)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "0.5 s" in error.details()
        assert "a stream of /vllm.grpc.engine.VllmEngine/Generate was ended" in caplog.text
        assert not served.engine.rows


# ---- tokens and tenants


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Served, grpc.Channel]]:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\nbob {BOB}\n")
    with serving(paged_core(), connect={"token": ALICE}, token_file=str(path)) as served, \
            grpc.insecure_channel(served.server.address) as channel:
        yield served, channel


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("token", [None, "nobody-0123456789abcdef", ALICE.upper()])
def test_nothing_without_a_token(guarded: tuple[Served, grpc.Channel], token: str | None, stream: bool):
    served, channel = guarded
    assert error_of(lambda: generate(channel, PROMPT, token, stream=stream)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert served.server.served.calls.ended == {"UNAUTHENTICATED": 1}
    assert list(generate(channel, PROMPT, ALICE, stream=stream, max_tokens=1))


@pytest.mark.parametrize("stream", [True, False])
def test_a_tenant_hits_its_own_prefixes_and_nobody_elses(guarded: tuple[Served, grpc.Channel], stream: bool):
    def cached(token: str) -> int:
        *_, last = generate(guarded[1], PROMPT, token, stream=stream, max_tokens=1)
        return last.complete.cached_tokens

    assert cached(ALICE) == 0
    assert cached(BOB) == 0
    assert [cached(token) for token in (ALICE, BOB)] == [HIT] * 2


def test_tenants_are_the_same_for_both_services(guarded: tuple[Served, grpc.Channel]):
    served, channel = guarded
    assert served.client.generate(PROMPT, max_tokens=1).usage.cached_tokens == 0
    (alice,), (bob,) = (list(generate(channel, PROMPT, one, stream=False, max_tokens=1)) for one in (ALICE, BOB))
    assert (alice.complete.cached_tokens, bob.complete.cached_tokens) == (HIT, 0)


def test_an_abort_ends_no_other_tenants_call(guarded: tuple[Served, grpc.Channel]):
    served, channel = guarded
    call = generate(channel, PROMPT, ALICE, max_tokens=200, ignore_eos=True)
    with held(served.core):  # type: ignore[arg-type]
        abort = pb_grpc.VllmEngineStub(channel).Abort
        abort(pb.AbortRequest(request_ids=["r"]), metadata=(("authorization", f"Bearer {BOB}"),))
    assert list(call)[-1].complete.finish_reason == "length"


# ---- refusals, of both services


def native(channel: grpc.Channel, prompt: list[int]) -> Any:
    return native_grpc.GenerationServiceStub(channel).GenerateStream(native_pb.GenerateRequest(
        token_ids=native_pb.TokenIds(ids=prompt), sampling=native_pb.SamplingParams(max_tokens=1)), timeout=30)


def native_whole(channel: grpc.Channel, prompt: list[int]) -> Any:
    return [native_grpc.GenerationServiceStub(channel).Generate(native_pb.GenerateRequest(
        token_ids=native_pb.TokenIds(ids=prompt), sampling=native_pb.SamplingParams(max_tokens=1)), timeout=30)]


def of_gateways(channel: grpc.Channel, prompt: list[int]) -> Any:
    return generate(channel, prompt, max_tokens=1)


def of_gateways_whole(channel: grpc.Channel, prompt: list[int]) -> Any:
    return generate(channel, prompt, stream=False, max_tokens=1)


@contextmanager
def full(limits: dict[str, Any], settings: dict[str, Any]) -> Iterator[grpc.Channel]:
    """A server whose engine stands still, and which has one request of 60 tokens."""
    core = paged_core(**limits)
    with ExitStack() as stack:
        served = stack.enter_context(serving(core, **settings))
        stack.enter_context(held(core))
        channel = stack.enter_context(grpc.insecure_channel(served.server.address))
        waiting = of_gateways(channel, [1] * 60)
        eventually(lambda: served.server.served.calls.num_running == 1)
        yield channel
        waiting.cancel()


@pytest.mark.parametrize("call", [native, native_whole, of_gateways, of_gateways_whole])
@pytest.mark.parametrize(("limits", "settings", "words"), [
    ({"max_waiting": 1}, {}, ["1 requests are waiting", "the limit is 1", "max_waiting"]),
    ({"max_waiting_tokens": 100}, {}, ["60 prompt tokens are waiting", "the 50 of", "100", "max_waiting_tokens"]),
    ({}, {"max_calls": 1}, ["1 calls are running", "the limit is 1", "max_calls"]),
], ids=["by count", "by tokens", "calls"])  # fmt: skip
def test_what_is_too_much_is_refused_at_once_with_a_hint(call: Any, limits: dict, settings: dict, words: list[str]):
    with full(limits, settings) as channel:
        error = error_of(lambda: call(channel, [1] * 50))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert all(word in error.details() for word in [*words, "try again later"]), error.details()
    (hint,) = [value for key, value in error.trailing_metadata() if key == retry_hint.KEY]
    assert retry_hint.SHORTEST <= int(hint) <= retry_hint.LONGEST
