"""The real engine on a device whose steps take declared times: what comes late comes late by the host.

The times are of the order of a model of 8B on one accelerator. Both halves of a step overlap as on a device: a step
begins when it is dispatched or when the one before has ended, whichever is later.
"""

import time
from typing import NamedTuple

import numpy as np

from benchmarks.serving.counting import MAX_MODEL_LEN
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.engine_thread import EngineThread
from jaxinfer.executor import InFlight
from jaxinfer.page_pool import PagePool
from jaxinfer.scheduler import Scheduler
from jaxinfer.types import StepKind, StepPlan, StepResult

ROUND_SECONDS = 0.010
"""A decode round, whatever its rows: it reads the weights."""
PROMPT_TOKEN_SECONDS = 25e-6
"""Each token of a step with prompts, on top of a round."""
TOKEN = 1234

CONFIG = EngineConfig(max_model_len=MAX_MODEL_LEN, num_pages=64 * MAX_MODEL_LEN // 16)
"""The defaults: 64 rows, 2,048 tokens a step, 8 decode rounds while nobody waits."""


class Step(NamedTuple):
    """One that has run. seconds: what it took, as declared. num_rows: rows that got tokens."""

    seconds: float
    num_rows: int


class PacedDevice:
    """A `StepRunner`. Every token is TOKEN."""

    def __init__(self):
        self._steps: list[Step] = []
        self._late: list[float] = []
        self._free_at = 0.0
        self._left: dict[int, int] = {}

    def dispatch(self, plan: StepPlan) -> InFlight:
        for init in plan.init_rows:
            self._left[init.slot] = init.tokens_left
        tokens = [self._tokens(slot, plan.num_rounds) if samples else []
                  for slot, samples in zip(plan.slots, plan.samples, strict=True)]
        seconds = step_seconds(plan)
        self._free_at = max(time.monotonic(), self._free_at) + seconds
        self._steps.append(Step(seconds, sum(map(bool, tokens))))
        return InFlight(plan, (self._free_at, tokens), [])

    def _tokens(self, slot: int, most: int) -> list[int]:
        count = min(most, self._left[slot])
        self._left[slot] -= count
        return [TOKEN] * count

    def is_ready(self, step: InFlight) -> bool:
        return time.monotonic() >= step.result[0]

    def read(self, step: InFlight) -> StepResult:
        ready_at, tokens = step.result
        left = ready_at - time.monotonic()
        if left > 0:
            time.sleep(left)
            self._late.append(time.monotonic() - ready_at)
        return StepResult(tokens)

    def proposed(self, step: InFlight) -> list[list[int]] | None:
        return None

    def sample(self, step: InFlight, masks: np.ndarray) -> None:
        raise AssertionError("no request here has a grammar")

    def reset(self) -> None:
        raise AssertionError("no step here fails")

    def take_steps(self) -> list[Step]:
        """Those since the last call."""
        self._steps, steps = [], self._steps
        return steps

    def take_lateness(self) -> list[float]:
        """By how much the engine woke late at the end of a step, seconds, since the last call."""
        self._late, late = [], self._late
        return late


def step_seconds(plan: StepPlan) -> float:
    if plan.kind is StepKind.DECODE:
        return plan.num_rounds * ROUND_SECONDS
    return ROUND_SECONDS + plan.num_tokens * PROMPT_TOKEN_SECONDS


def longest_step() -> float:
    """Seconds of the longest program that the engine declares: all rounds fused, or a full step of prompts."""
    return max(CONFIG.max_decode_rounds * ROUND_SECONDS,
               ROUND_SECONDS + CONFIG.max_num_batched_tokens * PROMPT_TOKEN_SECONDS)


def paced_engine(device: PacedDevice, max_waiting: int) -> EngineThread:
    scheduler = Scheduler(CONFIG, PagePool(CONFIG.num_pages, CONFIG.page_size))
    return EngineThread(Engine(device, scheduler), max_waiting)
