"""The real scheduler, pages and engine thread around a device that counts in Python: next token is last + 1."""

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
from jaxinfer.executor import InFlight
from jaxinfer.page_pool import PagePool
from jaxinfer.scheduler import Scheduler
from jaxinfer.types import StepPlan, StepResult

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
        tokens: list[list[int]] = [[] for _ in plan.slots]
        for row, (slot, known, samples) in enumerate(zip(plan.slots, plan.tokens, plan.samples, strict=True)):
            state = self._rows[slot]
            state.last = known[-1] if known else state.last
            for _ in range(plan.num_rounds if samples else 0):
                if state.left:
                    tokens[row].append(self._next(state))
        return InFlight(plan, tokens, [])

    def _next(self, row: _Row) -> int:
        row.last = (row.last + 1) % VOCAB_SIZE
        row.left = 0 if row.last in row.stop_ids else row.left - 1
        return row.last

    def is_ready(self, step: InFlight) -> bool:
        return True

    def read(self, step: InFlight) -> StepResult:
        return StepResult(step.result)

    def proposed(self, step: InFlight) -> list[list[int]] | None:
        return None

    def sample(self, step: InFlight, masks: np.ndarray) -> None:
        raise AssertionError("no request here has a grammar")


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
