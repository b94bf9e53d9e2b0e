"""The real scheduler, pages and engine thread around a device that counts in Python: next token is last + 1, or where
a grammar forbids that the first that it allows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event, Thread
from typing import Any

import numpy as np
from counting_engine import VOCAB_SIZE, make_core

from jaxinfer.config import EngineConfig
from jaxinfer.core import Core
from jaxinfer.engine import Engine
from jaxinfer.engine_thread import EngineThread
from jaxinfer.executor import InFlight, Unfinished
from jaxinfer.grammar_matcher import allows
from jaxinfer.page_pool import PagePool
from jaxinfer.scheduler import Scheduler
from jaxinfer.types import StepPlan, StepResult, mask_width

PAGE_SIZE = 8


@dataclass
class _Row:
    last: int
    left: int
    stop_ids: tuple[int, ...]


class CountingRunner:
    """A `StepRunner`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._rows: dict[int, _Row] = {}

    def dispatch(self, plan: StepPlan) -> InFlight:
        for init in plan.init_rows:
            self._rows[init.slot] = _Row(0, init.tokens_left, init.stop_ids)
        for slot, known in zip(plan.slots, plan.tokens, strict=True):
            self._rows[slot].last = known[-1] if known else self._rows[slot].last
        if plan.constrained:
            shape = (len(plan.slots), mask_width(VOCAB_SIZE))
            return InFlight(plan, None, [], Unfinished((), (), shape))
        return InFlight(plan, self._sampled(plan, None), [])

    def _sampled(self, plan: StepPlan, masks: np.ndarray | None) -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in plan.slots]
        for row, (slot, samples) in enumerate(zip(plan.slots, plan.samples, strict=True)):
            state = self._rows[slot]
            for _ in range(plan.num_rounds if samples else 0):
                if state.left:
                    tokens[row].append(self._next(state, None if masks is None else masks[row]))
        return tokens

    def _next(self, row: _Row, mask: np.ndarray | None) -> int:
        wanted = (row.last + 1) % VOCAB_SIZE
        row.last = wanted if mask is None or allows(mask, wanted) else next(
            id for id in range(VOCAB_SIZE) if allows(mask, id))
        row.left = 0 if row.last in row.stop_ids else row.left - 1
        return row.last

    def is_ready(self, step: InFlight) -> bool:
        return True

    def read(self, step: InFlight) -> StepResult:
        return StepResult(step.result)

    def proposed(self, step: InFlight) -> list[list[int]] | None:
        return None

    def sample(self, step: InFlight, masks: np.ndarray) -> None:
        step.result = self._sampled(step.plan, masks)


def paged_core(**limits: Any) -> Core:
    """limits: of the engine's thread."""
    config = EngineConfig(max_model_len=256, num_pages=256, page_size=PAGE_SIZE, max_num_seqs=4)
    engine = Engine(CountingRunner(), Scheduler(config, PagePool(config.num_pages, config.page_size)))
    core = make_core(max_model_len=config.max_model_len)
    return replace(core, engine=EngineThread(engine, **({"max_waiting": 64} | limits)))


@contextmanager
def held(core: Core) -> Iterator[None]:
    """The engine stands still inside."""
    holds, gate = Event(), Event()
    Thread(target=core.engine.run, args=(lambda engine: (holds.set(), gate.wait(10)),), daemon=True).start()
    assert holds.wait(10)
    try:
        yield
    finally:
        gate.set()
