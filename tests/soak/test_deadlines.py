"""Deadlines that pass in the queue, in prefill and in decode. The real scheduler; its device steps when told."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
from counting_engine import VOCAB_SIZE, make_core
from figures import Figures
from paged_engine import CountingRunner
from reading import Reading
from serving import Served, eventually, serving

from jaxinfer.config import EngineConfig
from jaxinfer.core import Core
from jaxinfer.engine import Engine
from jaxinfer.engine_thread import EngineThread
from jaxinfer.executor import InFlight
from jaxinfer.page_pool import PagePool
from jaxinfer.scheduler import Scheduler
from jaxinfer.types import StepPlan
from serve.client import Stream

SECONDS = 0.4
"""The deadline."""
ROWS = 2
PROMPT = 97
CONFIG = EngineConfig(max_model_len=256, num_pages=64, page_size=8, max_num_seqs=ROWS, max_num_batched_tokens=16,
                      max_decode_rounds=1)


class SteppedRunner(CountingRunner):
    """Each step waits until it is told to go on."""

    def __init__(self):
        super().__init__()
        self._permits = threading.Semaphore(0)
        self._asked = 0

    def dispatch(self, plan: StepPlan) -> InFlight:
        self._asked += 1
        self._permits.acquire()
        return super().dispatch(plan)

    def step(self) -> None:
        """One step; then the engine has planned the next one and waits again, so there must be work for it."""
        eventually(lambda: self._asked, timeout=30)
        asked = self._asked
        self._permits.release()
        eventually(lambda: self._asked > asked, timeout=30)

    def finish(self, core: Core) -> None:
        """Steps until nothing is left."""
        while core.engine.load().num_running + core.engine.load().num_waiting:
            self._permits.release()
            threading.Event().wait(0.002)
        while self._permits.acquire(blocking=False):
            pass


@pytest.fixture(scope="module")
def runner() -> SteppedRunner:
    return SteppedRunner()


@pytest.fixture(scope="module")
def served(runner: SteppedRunner) -> Iterator[Served]:
    engine = Engine(runner, Scheduler(CONFIG, PagePool(CONFIG.num_pages, CONFIG.page_size)))
    core = replace(make_core(max_model_len=CONFIG.max_model_len), engine=EngineThread(engine, max_waiting=64))
    with serving(core) as found:
        yield found
        runner.finish(core)
        runner._permits.release(1000)  # it stops at once


class Round:
    """One request with a deadline beside `others` that have the rows of the batch."""

    def __init__(self, served: Served, runner: SteppedRunner, others: int):
        assert served.core is not None
        self._served, self._runner, self.engine = served, runner, served.core.engine
        self._others = [Reading(served.client.stream([PROMPT], max_tokens=200, ignore_eos=True)) for _ in range(others)]
        eventually(lambda: self._num_calls() == others)
        for _ in range(3):  # all have begun
            runner.step()
        assert self.engine.load().num_running == others
        self._begun = self._num_begun()

    def ask(self, prompt: list[int]) -> Stream:
        """The request; it has got as far as the queue."""
        stream = self._served.client.stream(prompt, max_tokens=100, ignore_eos=True, timeout=SECONDS)
        eventually(lambda: self._num_calls() == len(self._others) + 1)
        return stream

    def phase(self) -> str:
        """Where the request is now."""
        if self._num_begun() == self._begun:
            return "queue"
        return "prefill" if self.engine.load().num_waiting_tokens > ROWS else "decode"

    def ends(self, stream: Stream) -> bool:
        """Waits for the deadline, makes one step, and says whether the request is gone and all it held is free."""
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: self._num_calls() == len(self._others))
        self._runner.step()
        load = self.engine.load()
        held = -(-(200 + 8) // CONFIG.page_size)
        return load.num_running + load.num_waiting == len(self._others) and load.pages_used <= held * len(self._others)

    def has_begun(self) -> bool:
        return self._num_begun() > self._begun

    def close(self) -> int:
        """Ends the others; returns how many tokens they had, all of them right."""
        for other in self._others:
            other.stream.cancel()
            other.join()
        eventually(lambda: self._num_calls() == 0)
        assert self._served.core is not None
        self._runner.finish(self._served.core)
        eventually(lambda: self.engine.load().pages_used == 0)
        for other in self._others:
            assert other.ids == [(PROMPT + 1 + number) % VOCAB_SIZE for number in range(len(other.ids))]
        return sum(len(other.ids) for other in self._others)

    def _num_calls(self) -> int:
        return self._served.server.served.calls.num_running

    def _num_begun(self) -> int:
        """Samples that were ever scheduled."""
        return self.engine.metrics()["queue_seconds"]["count"]


def test_deadlines(served: Served, runner: SteppedRunner, count, figures: Figures):
    rng, phases, late, ran, beside = random.Random(6), Counter[str](), 0, 0, 0
    rounds = count(6, 120)
    for number in range(rounds):
        wanted = ("queue", "prefill", "decode")[number % 3]
        steps = {"queue": rng.randint(0, 5), "prefill": rng.randint(2, 5), "decode": rng.randint(4, 20)}[wanted]
        one = Round(served, runner, ROWS if wanted == "queue" else ROWS - 1)
        # New tokens: those that came before are in the prefix cache.
        stream = one.ask(rng.choices(range(256), k=130 if wanted == "prefill" else 3))
        for _ in range(steps):
            runner.step()
        phases[one.phase()] += 1
        late += not one.ends(stream)
        ran += wanted == "queue" and one.has_begun()
        beside += one.close()
    assert served.core is not None
    leaks = served.core.engine.metrics()["idle_leaks"]
    figures(deadlines=rounds, phases=dict(phases), queued_that_ran=ran, not_free_after_one_step=late, idle_leaks=leaks,
            tokens_beside=beside)
    assert phases.keys() == {"queue", "prefill", "decode"}
    assert (ran, late, leaks) == (0, 0, 0)
    assert beside >= rounds, "the others had nothing to be compared"
