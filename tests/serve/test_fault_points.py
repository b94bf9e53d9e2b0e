"""A fault at every named place, under streams that must not notice: what it takes along is what it says it does.

The real engine thread, scheduler, pages, bridge and gRPC; only the device counts in Python.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from paged_engine import held, paged_core
from serving import Served, eventually, serving

from jaxinfer.engine import MAX_FAILURES
from jaxinfer.fault_points import POINTS, Harm, failing, fault_point

CANARIES = 3
LENGTH = 120
HIDDEN = "text of an error that is not ours"
VICTIM: dict[str, Any] = {"request_id": "victim", "max_tokens": 20, "temperature": 0.0}
Send = Callable[[Served], Any]


class Panic(BaseException):
    """As what the bindings of Rust libraries raise."""


def plain(served: Served) -> Any:
    return served.client.stream([7], **VICTIM)


def text(served: Served) -> Any:
    return served.client.stream("a", **VICTIM)


def chat(served: Served) -> Any:
    return served.client.stream([{"role": "user", "content": "a"}], **VICTIM)


def constrained(served: Served) -> Any:
    return served.client.stream([97], structured_outputs={"regex": "[a-z]{20}"}, **VICTIM)


SENT_BY: dict[str, Send] = {"tokenize": text, "template": chat, "grammar": constrained, "mask": constrained}
"""What passes the place, where a plain request does not."""
TIMES = {"mask": 2}
"""Masks of many rows are computed at once, and each alone after a failure."""
IN_THE_REQUEST = sorted(name for name, harm in POINTS.items() if harm is Harm.REQUEST)
IN_THE_ENGINE = ("admit", "mask", "commit", "consume")
"""Of those, the places that a request passes when the engine goes on."""
IN_THE_STEP = sorted(name for name, harm in POINTS.items() if harm is Harm.STEP)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(paged_core()) as found:
        yield found


def counted(first: int, count: int = LENGTH) -> list[int]:
    return [(first + 1 + offset) % 257 for offset in range(count)]


def ids_of(stream: Any) -> list[int]:
    return [token for delta in stream for token in delta.token_ids]


def canaries(served: Served) -> list[Any]:
    return [served.client.stream([first], max_tokens=LENGTH, ignore_eos=True, temperature=0.0)
            for first in range(CANARIES)]


def check(streams: list[Any]) -> None:
    assert [ids_of(stream) for stream in streams] == [counted(first) for first in range(CANARIES)]


def check_idle(served: Served) -> None:
    """Nothing runs, waits or is held any more."""
    core, bridge = served.core, served.server.served._bridge
    assert core is not None and bridge is not None
    eventually(lambda: not served.server.served.calls.num_running and not core.engine.load().num_running)
    core.engine.run(lambda engine: engine.scheduler.check_invariants())
    load = core.engine.load()
    assert (load.num_waiting, load.pages_used, bridge.num_streams) == (0, 0, 0)


def wait_until_open(served: Served, count: int) -> None:
    bridge = served.server.served._bridge
    assert bridge is not None
    eventually(lambda: bridge.num_streams == count)


def code_of(stream: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    return caught.value.code(), caught.value.details() or ""  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("error", [RuntimeError(HIDDEN), Panic(HIDDEN)], ids=["error", "panic"])
@pytest.mark.parametrize("name", IN_THE_REQUEST)
def test_a_fault_in_one_request_ends_it_alone(name: str, error: BaseException, served: Served):
    assert served.core is not None
    times, subject = TIMES.get(name, 1), "" if name in SENT_BY else "victim"
    with failing(name, error, subject=subject, times=times) as fault:
        with held(served.core):
            others = canaries(served)
            wait_until_open(served, CANARIES)
            victim = SENT_BY.get(name, plain)(served)
            if name in IN_THE_ENGINE:
                wait_until_open(served, CANARIES + 1)
            else:
                code, text = code_of(victim)
        if name in IN_THE_ENGINE:
            code, text = code_of(victim)
        assert fault.raised == times
    assert code is grpc.StatusCode.INTERNAL and HIDDEN not in text
    check(others)
    assert list(served.client.generate([7], **VICTIM).token_ids) == counted(7, 20)
    check_idle(served)


@pytest.mark.parametrize("name", IN_THE_STEP)
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_fault_in_a_step_costs_time_only(name: str, after: int, served: Served):
    assert served.core is not None
    with failing(name, RuntimeError(HIDDEN), after=after) as fault:
        with held(served.core):
            others = canaries(served)
            wait_until_open(served, CANARIES)
        check(others)
        assert fault.raised == 1
    assert served.core.engine.metrics()["failed_steps"] == 1
    check_idle(served)


@pytest.mark.parametrize("name", ["loop", "reset", *IN_THE_STEP])
def test_a_fault_that_the_engine_does_not_survive_ends_every_stream(name: str, served: Served):
    assert served.core is not None
    with ExitStack() as faults:
        if name == "reset":  # which only a failed step needs
            faults.enter_context(failing("plan", RuntimeError(HIDDEN)))
        times = MAX_FAILURES if POINTS[name] is Harm.STEP else 1
        faults.enter_context(failing(name, RuntimeError(HIDDEN), times=times))
        with held(served.core):
            others = canaries(served)
            wait_until_open(served, CANARIES)
        for stream in others:
            code, text = code_of(stream)
            assert code is grpc.StatusCode.UNAVAILABLE and HIDDEN not in text
    engine = served.core.engine
    eventually(lambda: not engine.alive)
    assert code_of(served.client.stream([1], max_tokens=1))[0] is grpc.StatusCode.UNAVAILABLE


def test_every_place_in_the_code_is_named_and_every_name_is_a_place(repository: Path):
    called = {name for folder in ("jaxinfer", "serve") for path in (repository / folder).rglob("*.py")
              for name in re.findall(r'fault_point\("(\w+)"', path.read_text()) if path.name != "fault_points.py"}
    assert called == set(POINTS)
    assert {*IN_THE_REQUEST, *IN_THE_STEP, "loop", "reset"} == set(POINTS) - {"compile"}, "each has its test here"


def test_a_fault_comes_when_it_is_told_to_and_for_whom():
    with failing("commit", KeyError(1), after=1, times=2, subject="a") as fault:
        for subject, raises in [("b", False), ("a", False), ("a/1", True), ("b", False), ("a/2", True), ("a", False)]:
            try:
                fault_point("commit", subject)
            except KeyError:
                assert raises
            else:
                assert not raises
        with pytest.raises(ValueError, match="armed already"), failing("commit", KeyError()):
            pass
    assert fault.raised == 2
    fault_point("commit", "a")
    with pytest.raises(ValueError, match="no fault point"), failing("comit", KeyError()):
        pass
