"""An engine on a device that answers at once: the real scheduler, packing and reading, no transfers, no programs."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any

import jax
import numpy as np

from benchmarks.workloads import LONGEST, SHORTEST, VOCAB_SIZE, random_prompt
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.executor import Executor, InFlight
from jaxinfer.layout import result_width
from jaxinfer.page_pool import PagePool
from jaxinfer.programs import APPEND, SAMPLE, decode_key, prefill_key
from jaxinfer.scheduler import Scheduler
from jaxinfer.steps import Unsampled
from jaxinfer.testing import CountingModel
from jaxinfer.types import Request, SamplerForm, SamplingParams, StepKind, StepPlan, StepResult

STOP_ID = 0
NUM_PREPARED = 64


@dataclass(frozen=True, slots=True)
class Scenario:
    """backlog: requests that wait at any time. outputs: tokens, log-uniform. stop_chance: of a token to be STOP_ID."""

    num_rows: int
    rounds: int = 1
    backlog: int = 0
    outputs: tuple[int, int] = (SHORTEST, LONGEST)
    stop_chance: float = 0.0

    def config(self) -> EngineConfig:
        """The defaults of `LLM`, with pages for the longest request in every row."""
        longest = LONGEST + self.outputs[1]
        return EngineConfig(max_model_len=4096, num_pages=self.num_rows * (1 + longest // 16),
                            max_num_seqs=self.num_rows, max_decode_rounds=self.rounds)


class InstantExecutor(Executor):
    """The real executor around programs that return a prepared result."""

    def __init__(self, config: EngineConfig, stop_chance: float, rng: np.random.Generator):
        super().__init__(CountingModel(), None, config, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        self._programs: dict[Any, Any] = {APPEND: lambda state, new_pages: state}
        shape = (config.max_num_seqs, result_width(SamplerForm.FULL))
        prefill = prepared(rng, shape, stop_chance, None)
        nothing = jax.device_put(np.zeros(config.max_num_seqs, np.int32))
        unsampled = Unsampled(nothing, nothing, nothing, nothing, nothing, nothing, nothing)
        self._programs[SAMPLE] = lambda params, rows, unsampled: (rows, next(prefill))
        for layout in self._batcher.prefill:
            self._programs[prefill_key(layout)] = lambda params, state, flat: (state, unsampled, None)
        for layout in self._batcher.decode:
            shape = (config.max_decode_rounds, layout.num_rows, 1)
            results = {rounds: prepared(rng, shape, stop_chance, rounds) for rounds in {1, config.max_decode_rounds}}
            for form in (SamplerForm.GREEDY, SamplerForm.SIMPLE):
                self._programs[decode_key(layout, form)] = instant_decode(results)

    def _put(self, array: np.ndarray) -> Any:
        return array


def instant_decode(results: dict[int, Iterator[jax.Array]]) -> Callable[..., tuple[Any, jax.Array]]:
    return lambda params, state, flat: (state, next(results[int(flat[0])]))


def prepared(rng: np.random.Generator, shape: tuple[int, ...], stop_chance: float, rounds: int | None
             ) -> Iterator[jax.Array]:
    """Results i32[shape] of random tokens, again and again; -1 after the first `rounds` rounds of a decode step."""
    found = []
    for _ in range(NUM_PREPARED):
        tokens = rng.integers(1, VOCAB_SIZE, shape, np.int32)
        tokens[rng.random(shape) < stop_chance] = STOP_ID
        if rounds is not None:
            tokens[rounds:] = -1
        found.append(jax.device_put(tokens))
    return cycle(found)


@dataclass(slots=True)
class Clocked:
    """A StepRunner that adds up the CPU seconds of the two halves of another one; `kind` is the latest plan's."""

    runner: Executor
    kind: StepKind | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def dispatch(self, plan: StepPlan) -> InFlight:
        self.kind = plan.kind
        return timed(self.seconds, "pack", self.runner.dispatch)(plan)

    def proposed(self, step: InFlight) -> list[list[int]] | None:
        return self.runner.proposed(step)

    def sample(self, step: InFlight, masks: np.ndarray) -> None:
        timed(self.seconds, "pack", self.runner.sample)(step, masks)

    def is_ready(self, step: InFlight) -> bool:
        return self.runner.is_ready(step)

    def read(self, step: InFlight) -> StepResult:
        return timed(self.seconds, "read", self.runner.read)(step)

    def reset(self) -> None:
        self.runner.reset()


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose CPU time is added to `seconds[name]`."""
    def run(*arguments: Any, **options: Any) -> Any:
        began = time.thread_time()
        result = function(*arguments, **options)
        seconds[name] += time.thread_time() - began
        return result

    return run


class InstantEngine:
    """An engine on an instant device and a never-ending supply of requests."""

    def __init__(self, scenario: Scenario):
        config = scenario.config()
        self.scenario = scenario
        self.executor = InstantExecutor(config, scenario.stop_chance, np.random.default_rng(0))
        self.scheduler = Scheduler(config, PagePool(config.num_pages, config.page_size))
        self.engine = Engine(self.executor, self.scheduler)
        self.requests = self.supply(random.Random(0))
        self.add_seconds: list[float] = []
        self.fill()

    def supply(self, rng: random.Random) -> Iterator[Request]:
        params = SamplingParams(detokenize=False)
        for number in count():
            prompt, output = (round(low * (high / low) ** rng.random())
                              for low, high in ((SHORTEST, LONGEST), self.scenario.outputs))
            yield Request(id=str(number), prompt=tuple(random_prompt(prompt, rng)), params=params, max_tokens=output,
                          seed=number, stop_ids=(STOP_ID,), arrival=time.monotonic())

    def fill(self) -> None:
        """A request for every row, and steps until all of them decode."""
        for _ in range(self.scenario.num_rows):
            self.engine.add(next(self.requests))
        while self.scheduler.num_waiting or self.scheduler.load().num_waiting_tokens:
            self.engine.step()
        self.feed()

    def feed(self) -> None:
        """Keeps the backlog."""
        while self.scheduler.num_waiting < self.scenario.backlog:
            request = next(self.requests)
            began = time.perf_counter()
            self.engine.add(request)
            self.add_seconds.append(time.perf_counter() - began)

    def step_seconds(self, num_steps: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
        """What each of the next steps took; the requests that fill the backlog come between them, off the clock."""
        found = []
        for _ in range(num_steps):
            self.feed()
            began = clock()
            self.engine.step()
            found.append(clock() - began)
        return found

    def split(self, num_steps: int) -> tuple[dict[str, float], dict[StepKind, list[float]]]:
        """Mean CPU seconds a step of plan, pack, read and commit, and the whole steps' by the kind they dispatched.

        The extra clocks cost a few microseconds.
        """
        clocked = self.engine.runner = Clocked(self.executor)
        plan, commit = self.scheduler.plan, self.scheduler.commit
        self.scheduler.plan = timed(clocked.seconds, "plan", plan)
        self.scheduler.commit = timed(clocked.seconds, "commit", commit)
        by_kind = defaultdict(list)
        for _ in range(num_steps):
            seconds = self.step_seconds(1, time.thread_time)
            by_kind[clocked.kind] += seconds
        self.engine.runner, self.scheduler.plan, self.scheduler.commit = self.executor, plan, commit
        return {name: clocked.seconds[name] / num_steps for name in ("plan", "pack", "read", "commit")}, by_kind
