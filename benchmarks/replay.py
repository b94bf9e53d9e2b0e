"""The device limit: the programs of a recorded run called again, back to back, without any host work between them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from jaxinfer import compile_cache
from jaxinfer.batch import Batcher, Layout
from jaxinfer.executor import Executor, InFlight, run_prefill
from jaxinfer.layout import PrefillLayout
from jaxinfer.programs import APPEND, EXTRA_PAGES, SAMPLE, Key, compile_all, declare, decode_key, prefill_key
from jaxinfer.types import StepKind, StepPlan, StepResult


@dataclass(slots=True)
class Recorder:
    """A StepRunner that passes plans on to another one, and notes them and their results.

    waited: seconds in which the engine's thread had nothing to do but to wait for the device.
    """

    runner: Executor
    plans: list[StepPlan] = field(default_factory=list)
    results: list[jax.Array] = field(default_factory=list)
    waited: float = 0.0

    def dispatch(self, plan: StepPlan) -> InFlight:
        step = self.runner.dispatch(plan)
        self.plans.append(plan)
        self.results.append(step.result)
        return step

    def proposed(self, step: InFlight) -> list[list[int]] | None:
        return self.runner.proposed(step)

    def sample(self, step: InFlight, masks: np.ndarray) -> None:
        raise ValueError("a step with grammars cannot be played again: its masks are not noted")

    def is_ready(self, step: InFlight) -> bool:
        return self.runner.is_ready(step)

    def read(self, step: InFlight) -> StepResult:
        began = time.perf_counter()
        step.result.block_until_ready()
        self.waited += time.perf_counter() - began
        return self.runner.read(step)

    def reset(self) -> None:
        self.runner.reset()

    def forget(self) -> None:
        """Begins a new record."""
        self.plans.clear()
        self.results.clear()
        self.waited = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """keys: of the programs of a step. layout: None appends pages. samples: whether any row of a prefill step does."""

    keys: tuple[Key, ...]
    layout: Layout | None
    inputs: jax.Array
    samples: bool = False


class Replay:
    """Calls the programs of an executor as its plans did.

    full_width: every decode step runs the program of the most rows, however few its plan has.
    """

    def __init__(self, executor: Executor, full_width: bool = False):
        config = executor.config
        self._executor = executor
        self._batcher = Batcher(replace(config, row_buckets=config.row_buckets[-1:]) if full_width else config)
        self._programs: dict[Key, jax.stages.Compiled] = {}

    def seconds(self, plans: Sequence[StepPlan], results: Sequence[jax.Array] | None = None) -> float:
        """Time from the first call on a fresh state until the device has done the last; the state is fresh again after.

        results: what the plans' own run computed. Raises AssertionError when the replay computes anything else.
        """
        calls = [call for plan in plans for call in self._calls(plan)]
        self._compile({key for call in calls for key in call.keys})
        self._executor.reset()
        try:
            seconds, found = self._run(calls)
        finally:
            self._executor.reset()
        if results is not None:
            for mine, recorded in zip(found, results, strict=True):
                np.testing.assert_array_equal(np.asarray(mine), np.asarray(recorded))
        return seconds

    def _run(self, calls: Sequence[Call]) -> tuple[float, list[jax.Array]]:
        params, state = self._executor.signature.params, self._executor.signature.state
        jax.block_until_ready((state, [call.inputs for call in calls]))
        results = []
        began = time.perf_counter()
        for call in calls:
            if call.layout is None:
                state = self._programs[APPEND](state, call.inputs)
                continue
            if isinstance(call.layout, PrefillLayout):
                state, result, _ = run_prefill(self._programs, call.layout, params, state, call.inputs, call.samples)
            else:
                state, result = self._programs[call.keys[0]](params, state, call.inputs)
            results.append(result)
        jax.block_until_ready((state, results))
        return time.perf_counter() - began, results

    def _calls(self, plan: StepPlan) -> Iterator[Call]:
        """What a step calls, with its inputs on the device."""
        place = self._executor.signature.replicated
        layout, flat, extra = self._batcher.pack(plan)
        for first in range(0, len(extra), EXTRA_PAGES):
            chunk = np.full((EXTRA_PAGES, 3), self._batcher.no_slot, np.int32)
            part = extra[first:first + EXTRA_PAGES]
            chunk[:len(part)] = part
            yield Call((APPEND,), None, jax.device_put(chunk, place))
        prefills = isinstance(layout, PrefillLayout)
        keys = (prefill_key(layout), SAMPLE) if prefills else (decode_key(layout, plan.sampler),)
        yield Call(keys, layout, jax.device_put(flat, place), any(plan.samples))

    def _compile(self, keys: set[Key]) -> None:
        """Makes the programs that are not there yet; the compile cache has them from the engine's start."""
        missing = {key: program for key, program in declare(self._executor.signature).items()
                   if key in keys - self._programs.keys()}
        if missing:
            with compile_cache.open_cache():
                self._programs |= compile_all(missing, workers=2, progress=lambda name: None)


@dataclass(frozen=True, slots=True)
class Steps:
    """Counts of a record. rounds: of decode steps, in all; rows: that they computed, in all."""

    prefills: int
    decodes: int
    rounds: int
    rows: int

    @classmethod
    def of(cls, plans: Sequence[StepPlan]) -> "Steps":
        decodes = [plan for plan in plans if plan.kind is StepKind.DECODE]
        return cls(len(plans) - len(decodes), len(decodes), sum(plan.num_rounds for plan in decodes),
                   sum(plan.num_rounds * len(plan.slots) for plan in decodes))
