"""A hang is told from work: health, new calls and the process follow it, and stacks are in the log."""

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from paged_engine import held, paged_core
from serving import Served, eventually, serving

from jaxinfer.engine_thread import EngineThread
from jaxinfer.fault_points import failing
from serve import watchdog
from serve.watchdog import LoopPulse, Watchdog, Watched

LIMIT = 10.0


class Seen(list[str]):
    """What a watchdog says of one thing."""

    def watched(self, progress) -> Watched:
        return Watched("thing", progress, self.append, lambda: self.append("freed"))


def looks(dog: Watchdog, number: int) -> None:
    for _ in range(number):
        dog.look(1.0)


def test_what_gets_on_is_never_stuck_however_busy():
    seen, numbers = Seen(), count()
    looks(Watchdog([seen.watched(lambda: next(numbers))], LIMIT), 1000)
    assert not seen


def test_what_gets_on_seldom_enough_is_stuck_and_freed_when_it_does():
    seen, done = Seen(), [7]
    dog = Watchdog([seen.watched(lambda: done[0])], LIMIT)
    looks(dog, 10)  # the first look sees the number, nine see it again
    assert not seen
    looks(dog, 50)
    assert [text.startswith("the thing has work and has not got on for 10 s") for text in seen] == [True]
    done[0] += 1
    looks(dog, 1)
    assert seen[1:] == ["freed"]


def test_what_has_nothing_to_do_is_not_stuck_and_what_ends_so_is_freed():
    seen, progress = Seen(), [None]
    dog = Watchdog([seen.watched(lambda: progress[0])], LIMIT)
    looks(dog, 100)
    assert not seen
    progress[0] = 3  # pyright: ignore[reportArgumentType]
    looks(dog, 11)
    progress[0] = None
    looks(dog, 1)
    assert seen[1:] == ["freed"]


def test_it_gives_up_in_time_and_for_what_hangs_only():
    numbers, given_up = count(), []
    watched = [Seen().watched(lambda: next(numbers)), Seen().watched(lambda: 3)]
    dog = Watchdog(watched, LIMIT, 30.0, lambda: given_up.append(watched[1].seconds))
    looks(dog, 30)
    assert not given_up
    looks(dog, 1)
    assert given_up == [30.0]


def test_a_loop_gets_on_while_it_makes_the_calls_that_it_is_asked_to_make():
    asked = []
    pulse, seen = LoopPulse(asked.append), Seen()
    dog = Watchdog([seen.watched(pulse)], LIMIT)
    for _ in range(50):
        looks(dog, 1)
        while asked:
            asked.pop()()
    assert not seen
    looks(dog, 20)
    assert len(seen) == 1


class Blocked(logging.Handler):
    """A log that takes nothing until `gate` is set."""

    def __init__(self, happened: list[str]):
        super().__init__()
        self.gate = threading.Event()
        self._happened = happened

    def emit(self, record: logging.LogRecord) -> None:
        self.gate.wait(3)
        self._happened.append("logged")


def test_it_acts_first_and_does_not_wait_for_a_log_that_is_blocked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog, "LOG_SECONDS", 0.01)
    happened: list[str] = []
    handler = Blocked(happened)
    watched = Watched("thing", lambda: 3, lambda text: happened.append("stuck"))
    watchdog.log.addHandler(handler)
    try:
        looks(Watchdog([watched], LIMIT, 20.0, lambda: happened.append("given up")), 21)
        assert happened == ["stuck", "given up"]
        handler.gate.set()
        eventually(lambda: happened == ["stuck", "given up", "logged"])  # what came meanwhile does not pile up
    finally:
        watchdog.log.removeHandler(handler)


def test_a_loop_that_is_closed_has_nothing_to_do():
    loop = asyncio.new_event_loop()
    pulse = LoopPulse(loop.call_soon_threadsafe)
    assert pulse() == 0
    loop.close()
    assert pulse() is None


def test_closing_waits_for_a_look_that_is_taken():
    looking, go_on = threading.Event(), threading.Event()

    def progress() -> int | None:
        looking.set()
        go_on.wait(5)
        return None

    watchdog = Watchdog([Seen().watched(progress)], 0.01)
    watchdog.start()
    assert looking.wait(5)
    threading.Timer(0.1, go_on.set).start()
    watchdog.close()
    assert go_on.is_set() and not watchdog._thread.is_alive()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(paged_core(), hang_seconds=0.2) as found:
        yield found


def health_of(served: Served, service: str = "") -> int:
    with grpc.insecure_channel(served.server.address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


def test_health_follows_the_engine_and_streams_go_on_behind_a_hang(served: Served, caplog):
    """What runs is not given up: the step may end after all."""
    status = health_pb2.HealthCheckResponse
    names = ["", "jaxinfer.v1.GenerationService", *served.server.gateway_services]
    assert served.core is not None
    with caplog.at_level(logging.WARNING, "serve.watchdog"):
        with held(served.core):
            stream = served.client.stream([1], max_tokens=9, temperature=0.0)
            eventually(lambda: {health_of(served, name) for name in names} == {status.NOT_SERVING})
            with pytest.raises(grpc.RpcError) as refused:
                served.client.generate([1], max_tokens=1)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
            assert "engine has work and has not got on" in str(refused.value)
        eventually(lambda: {health_of(served, name) for name in names} == {status.SERVING})
    assert [token for delta in stream for token in delta.token_ids] == list(range(2, 11))
    assert served.client.generate([1], max_tokens=1).token_ids
    hung, *_, freed = (record.getMessage() for record in caplog.records)
    assert "jaxinfer-engine:" in hung and "gate.wait" in hung, "the stack of the thread that hangs"
    assert freed == "the engine gets on again"


def test_an_engine_that_dies_around_a_device_that_hangs_is_dead():
    """Its thread lives on, for as long as the device takes, and nothing else would tell."""
    core, gate = paged_core(), threading.Event()
    engine = cast(EngineThread, core.engine)
    engine._engine.drain = lambda: gate.wait(30) and []  # pyright: ignore[reportAttributeAccessIssue]
    with serving(core, hang_seconds=0.2) as served:
        try:
            with failing("loop", RuntimeError("a defect")), pytest.raises(grpc.RpcError):
                list(served.client.stream([1], max_tokens=9))
            eventually(lambda: not engine.alive)
            assert engine._thread.is_alive()
            served.call(served.server._suspend("it hangs"))
            served.call(served.server._suspend(None))
            assert health_of(served) == health_pb2.HealthCheckResponse.NOT_SERVING, "the dead do not get on again"
        finally:
            gate.set()


def test_a_process_whose_engine_hangs_for_good_ends():
    script = Path(__file__).parent / "serve_hanging.py"
    command = [sys.executable, script, "0.4", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ready on" in done.stdout and "the engine has not got on for 1 s; the process ends" in done.stderr
    assert "threading.Event().wait()" in done.stderr
