"""Abort of `vllm.grpc.engine`: it ends calls by the client's id, in whatever state they are, and only those."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from serving import Served, eventually, serving

from jaxinfer.errors import Overloaded

pytest.importorskip("smg_grpc_proto", reason="needs smg-grpc-proto")

from smg_grpc_proto import vllm_engine_pb2 as pb
from vllm_peer import Peer, connected, refusal

from serve.call_limit import ALWAYS_PASS
from serve.vllm_service import MAX_ABORTED, VLLM_SERVICE_NAME


@pytest.mark.parametrize("stream", [True, False])
def test_abort_ends_the_call_and_its_rows(stepped: Served, slow: Peer, stream: bool):
    call = slow.start(request_id="mine", max_tokens=100, n=2, stream=stream)
    eventually(lambda: len(stepped.engine.rows) == 2)
    stepped.engine.step()
    slow.abort("another")
    assert len(stepped.engine.rows) == 2
    slow.abort("mine", "mine")
    ends = [one.complete for one in call if one.HasField("complete")]
    assert sorted((one.index, one.finish_reason, one.completion_tokens) for one in ends) == [
        (0, "abort", 1), (1, "abort", 1)]
    assert stepped.engine.cancelled == [("mine", None)] and not stepped.engine.rows
    slow.abort("mine")


def test_abort_leaves_samples_that_have_ended(stepped: Served, slow: Peer):
    stepped.engine.tokens_per_step = 3
    call = slow.start(request_id="mine", max_tokens=100, n=2, stop=["e"])
    eventually(lambda: len(stepped.engine.rows) == 2)
    key = next(key for key in stepped.engine.rows if key[1] == 1)
    slower = stepped.engine.rows.pop(key)  # sample 1 does not step with the other
    stepped.engine.step()
    stepped.engine.rows[key] = slower
    eventually(lambda: ("mine", 0) in stepped.engine.cancelled)
    slow.abort("mine")
    ends = {one.complete.index: one.complete.finish_reason for one in call if one.HasField("complete")}
    assert ends == {0: "stop", 1: "abort"}


def test_abort_ends_every_call_of_that_id(stepped: Served, slow: Peer):
    calls = [slow.start(request_id="same", max_tokens=100) for _ in range(3)]
    eventually(lambda: len(stepped.engine.rows) == 3)
    slow.abort("same")
    assert [[one.complete.finish_reason for one in call] for call in calls] == [["abort"]] * 3
    assert not stepped.engine.rows


def test_no_id_is_not_an_id(stepped: Served, slow: Peer):
    call = slow.start(request_id="", max_tokens=100)
    eventually(lambda: len(stepped.engine.rows) == 1)
    slow.abort("")
    assert len(stepped.engine.rows) == 1
    call.cancel()


def test_abort_ends_no_call_of_another_tenant(tmp_path: Path):
    tokens = {name: f"{name}-0123456789abcdef" for name in ("alice", "bob")}
    (tmp_path / "tokens").write_text("".join(f"{name} {token}\n" for name, token in tokens.items()))
    with serving(make_core(CountingEngine()), connect={"token": tokens["alice"]},
                 token_file=str(tmp_path / "tokens")) as served, connected(served.server.address) as peer:  # fmt: skip
        def of(name: str) -> Any:
            return (("authorization", f"Bearer {tokens[name]}"),)

        call = peer.stub.Generate(pb.GenerateRequest(
            request_id="mine", tokenized=pb.TokenizedInput(input_ids=[1, 2])), metadata=of("alice"), timeout=20)
        eventually(lambda: len(served.engine.rows) == 1)
        abort = pb.AbortRequest(request_ids=["mine"])
        peer.stub.Abort(abort, metadata=of("bob"))
        assert len(served.engine.rows) == 1
        peer.stub.Abort(abort, metadata=of("alice"))
        assert [one.complete.finish_reason for one in call] == ["abort"]


def test_abort_before_the_request_is_in_the_engine(stepped: Served, slow: Peer, monkeypatch: pytest.MonkeyPatch):
    served, waiting, go_on = stepped.server.served, [], asyncio.Event()
    request = served.request

    async def held_up(*args: Any, **kwargs: Any) -> Any:
        waiting.append(True)
        await go_on.wait()
        return await request(*args, **kwargs)

    monkeypatch.setattr(served, "request", held_up)
    call = slow.start(request_id="mine", max_tokens=100)
    eventually(lambda: waiting)
    slow.abort("mine")
    stepped.loop.call_soon_threadsafe(go_on.set)
    assert [one.complete.finish_reason for one in call] == ["abort"]
    assert not stepped.engine.rows


def test_nothing_is_kept_of_calls_that_ended(stepped: Served, slow: Peer):
    stepped.engine.tokens_per_step = 5
    stepped.engine.submit_error = Overloaded("full")
    refusal(lambda: slow.start(request_id="refused"))
    stepped.engine.submit_error = None
    cancelled = slow.start(request_id="cancelled", max_tokens=9)
    eventually(lambda: stepped.engine.rows)
    cancelled.cancel()
    eventually(lambda: not stepped.engine.rows)
    assert stepped.engine.cancelled == [("cancelled", None)]
    eventually(lambda: stepped.server.served.calls.num_running == 0)
    slow.abort("refused", "cancelled")
    assert stepped.server.served.serving()[1].num_streams == 0


def test_a_server_at_its_limit_answers_health_checks_and_aborts():
    """With every place taken, also by calls that wait in the queue."""
    engine = CountingEngine()
    with serving(make_core(engine), max_calls=2) as served, connected(served.server.address) as peer:
        calls = [peer.start(request_id=name, max_tokens=100) for name in ("one", "two")]
        eventually(lambda: len(engine.rows) == 2)
        code, text = refusal(lambda: peer.start(request_id="three"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "the limit is 2" in text
        for _ in range(5):
            assert peer.stub.HealthCheck(pb.HealthCheckRequest(), timeout=5).healthy
        peer.abort("two")
        assert [one.complete.finish_reason for one in calls[1]] == ["abort"]
        eventually(lambda: accepts(peer))
        peer.abort("one")


def accepts(peer: Peer) -> bool:
    try:
        peer.stub.GetLoads(pb.GetLoadsRequest(), timeout=5)
    except grpc.RpcError:
        return False
    return True


def test_what_always_passes_is_there():
    names = {f"/{VLLM_SERVICE_NAME}/{method}" for method in ("HealthCheck", "Abort")}
    assert {one for one in ALWAYS_PASS if VLLM_SERVICE_NAME in one} == names
    known = {method.name for method in pb.DESCRIPTOR.services_by_name["VllmEngine"].methods}
    assert {name.rpartition("/")[2] for name in names} <= known


def test_the_ids_of_one_abort_are_bounded(served: Served, peer: Peer):
    peer.abort(*["unknown"] * MAX_ABORTED)
    code, text = refusal(lambda: peer.abort(*["unknown"] * (MAX_ABORTED + 1)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert all(word in text for word in ("request_ids", str(MAX_ABORTED), str(MAX_ABORTED + 1)))
