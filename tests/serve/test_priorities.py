"""Whose turn it is, through jaxinfer.v1: lower priorities run first, equal ones in the order of their arrival."""

import random
from threading import Event

import grpc
import pytest
from paged_engine import CountingRunner, held, paged_core
from serving import Served, eventually, serving

from jaxinfer.executor import InFlight
from jaxinfer.types import StepPlan
from serve.client import Envelope, Stream

ROWS = 4
"""Of `paged_core`."""
PRIORITIES = [-(2**31), -9, -9, -1, 0, 0, 0, 3, 5, 5, 2**31 - 1, None]
"""None: not set, which is 0."""


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First tokens of the prompts that got a row, in the order of the steps and of the rows in each."""
    found: list[int] = []
    dispatch = CountingRunner.dispatch

    def watched(runner: CountingRunner, plan: StepPlan) -> InFlight:
        new = {init.slot for init in plan.init_rows}
        found.extend(known[0] for slot, known in zip(plan.slots, plan.tokens, strict=True) if slot in new)
        return dispatch(runner, plan)

    monkeypatch.setattr(CountingRunner, "dispatch", watched)
    return found


def ask(served: Served, name: int, priority: int | None, tokens: int = 1) -> Stream:
    """A request whose prompt begins with `name`; when this returns it is queued, behind all that were asked before."""
    assert served.core is not None
    engine = served.core.engine
    before = engine._num_submitted  # type: ignore[attr-defined]
    given: Envelope = {"max_tokens": tokens, "ignore_eos": True}
    if priority is not None:
        given["priority"] = priority
    stream = served.client.stream([name, 0], timeout=30, **given)
    eventually(lambda: engine._num_submitted == before + 1)  # type: ignore[attr-defined]
    return stream


@pytest.mark.parametrize("seed", range(5))
def test_the_better_priority_runs_first_and_equal_ones_as_they_came(begun: list[int], seed: int):
    priorities = random.Random(seed).sample(PRIORITIES, k=len(PRIORITIES))
    with serving(paged_core()) as served:
        with held(served.core):  # type: ignore[arg-type]
            streams = [ask(served, name, priority) for name, priority in enumerate(priorities)]
        answers = [[id for delta in stream for id in delta.token_ids] for stream in streams]
    assert answers == [[1]] * len(priorities)
    assert begun == sorted(range(len(priorities)), key=lambda name: priorities[name] or 0)


def test_a_row_that_runs_is_not_displaced_by_a_better_one(begun: list[int], monkeypatch: pytest.MonkeyPatch):
    """The better one waits for the first row that ends, before those that came earlier; no row begins twice."""
    pauses, goes_on, dispatch = Event(), Event(), CountingRunner.dispatch

    def waits_once_all_run(runner: CountingRunner, plan: StepPlan) -> InFlight:
        if len(begun) == ROWS:
            pauses.set()
            assert goes_on.wait(10)
        return dispatch(runner, plan)

    monkeypatch.setattr(CountingRunner, "dispatch", waits_once_all_run)
    with serving(paged_core()) as served:
        with held(served.core):  # type: ignore[arg-type]
            streams = [ask(served, name, 5, tokens=100) for name in range(ROWS)]
        assert pauses.wait(10)
        for name, priority in ((10, 3), (11, -9)):
            streams.append(ask(served, name, priority))
        goes_on.set()
        answers = [sum(len(delta.token_ids) for delta in stream) for stream in streams]
    assert begun == [0, 1, 2, 3, 11, 10]
    assert answers == [100] * ROWS + [1, 1]


def test_a_full_queue_refuses_the_best_while_a_worse_one_waits():
    """Priority orders who waits; it makes no room."""
    with serving(paged_core(max_waiting=1)) as served, held(served.core):  # type: ignore[arg-type]
        waits = ask(served, 1, 5)
        with pytest.raises(grpc.RpcError) as caught:
            served.client.generate([2, 0], max_tokens=1, priority=-9, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        waits.cancel()
