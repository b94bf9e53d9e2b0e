"""The engine: admit, plan, run, commit, emit. One thread calls it."""

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jaxinfer.committing import failure
from jaxinfer.errors import StepFailed
from jaxinfer.executor import InFlight, Unfinished
from jaxinfer.fault_points import fault_point
from jaxinfer.masks import Masks
from jaxinfer.remote_drafts import RemoteDrafts
from jaxinfer.scheduler import Scheduler
from jaxinfer.types import Request, StepPlan, StepResult, TokenChunk

log = logging.getLogger(__name__)

MAX_FAILURES = 3
FAILURE_WINDOW = 600.0
"""Seconds: this many failed steps within it mean that recomputing does not help, so the engine gives up."""


class StepRunner(Protocol):
    """The device as the engine sees it (`executor.Executor`; tests and benchmarks have fakes)."""

    def dispatch(self, plan: StepPlan) -> InFlight: ...

    def proposed(self, step: InFlight) -> list[list[int]] | None: ...

    def sample(self, step: InFlight, masks: np.ndarray) -> None: ...

    def is_ready(self, step: InFlight) -> bool: ...

    def read(self, step: InFlight) -> StepResult: ...

    def reset(self) -> None: ...


class CompileCount(Protocol):
    """Compiles since the engine was ready (`compile_counter.CompileCounter`)."""

    @property
    def count(self) -> int: ...

    def watch_this_thread(self) -> None: ...


class Engine:
    """Runs requests to their end, one step ahead of what it has read."""

    def __init__(self, runner: StepRunner, scheduler: Scheduler, *, compiles: CompileCount | None = None,
                 remote: RemoteDrafts | None = None, clock: Callable[[], float] = time.monotonic):
        self.runner = runner
        self.scheduler = scheduler
        self._compiles = compiles
        self._remote = remote
        self._clock = clock
        self._in_flight: InFlight | None = None
        self._masks = Masks()
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self._read_at: float | None = None  # when the last step was read, if the one in flight was dispatched before
        self._waited = 0.0  # seconds of the present step in which the device, or a drafter elsewhere, was waited for

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work

    @property
    def num_steps(self) -> int:
        """Steps that were committed."""
        metrics = self.scheduler.metrics
        return metrics.prefill_steps + metrics.decode_steps

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        self.scheduler.cancel(request_id, index)
        if self._remote is not None:
            self._remote.forget_ended()

    def watch_compiles(self) -> None:
        """From now on only compiles of the calling thread count: the engine's own."""
        if self._compiles is not None:
            self._compiles.watch_this_thread()

    def metrics(self) -> dict[str, Any]:
        """Counters, gauges and histograms as plain data."""
        compiles = self._compiles.count if self._compiles is not None else 0
        remote = {} if self._remote is None else {"remote_proposals": self._remote.counts()}
        counted = {"compiles_after_ready": compiles, "pages_free": self.scheduler.pool.num_blank}
        return self.scheduler.metrics.snapshot() | counted | remote

    def check_rest(self) -> None:
        """Says so if pages are held or lost while nothing runs: it is a defect. Call it without work only."""
        problem = self.scheduler.pool.rest_problem()
        if problem is not None:
            self.scheduler.metrics.idle_leaks += 1
            log.error("nothing runs, but the pages are %s; please report it", problem)

    def step(self) -> list[TokenChunk]:
        """Dispatches the next step, then reads and commits the one before it.

        A step with rows that have a grammar samples only then: which tokens are legal follows from those just read.

        Raises StepFailed when steps keep failing; a single failure is recomputed and costs time only.
        """
        chunks: list[TokenChunk] = []  # what was committed before a failure is told all the same
        began, self._waited = self._clock(), 0.0
        try:
            if self._step(chunks):
                self.scheduler.metrics.record_times(self._clock() - began, self._waited)
        except Exception as error:
            self._recover(error)
        return chunks

    def _step(self, chunks: list[TokenChunk]) -> bool:
        """Whether there was a step to commit."""
        if self._remote is not None:
            self._await_proposals(self._remote)
        fault_point("plan")
        plan = self.scheduler.plan(single=self._remote is not None and self._remote.is_useful)
        if plan and self._remote is not None:
            plan = self._remote.with_proposals(plan, self.scheduler.rows_of(plan))
        if plan:
            fault_point("dispatch")
        dispatched = self.runner.dispatch(plan) if plan else None
        finished, self._in_flight = self._in_flight, dispatched
        if finished is not None:
            self._commit(finished, chunks)
        else:
            self._read_at = None
        if dispatched is not None and dispatched.unfinished is not None:
            chunks += self._sample(dispatched, dispatched.unfinished)
        return finished is not None

    def _await_proposals(self, remote: RemoteDrafts) -> None:
        """Proposals for the next step are useful until the device is done with the one in flight; the step is planned
        then. While they come, a step has one round: what they must foresee is what the step in flight says.
        """
        step = self._in_flight
        if step is not None and remote.is_useful:
            began = self._clock()
            remote.wait(lambda: self.runner.is_ready(step))
            self._waited += self._clock() - began

    def _commit(self, step: InFlight, chunks: list[TokenChunk]) -> None:
        """Adds what a step has brought to `chunks`, also where it fails behind some of its rows."""
        began = self._clock()
        fault_point("read")
        result = self.runner.read(step)
        now = self._clock()
        self._waited += now - began
        result.seconds, self._read_at = None if self._read_at is None else now - self._read_at, now
        self.scheduler.commit(step.plan, result, now, chunks)
        if self._remote is not None:
            self._remote.tell()

    def _sample(self, step: InFlight, halfway: Unfinished) -> list[TokenChunk]:
        """Lets the grammars of a dispatched step's rows say what is legal; the last chunks of rows whose grammar fails.
        """
        rows = self.scheduler.rows_of(step.plan)
        masks, failed = self._masks.of(step.plan, rows, halfway.mask_shape, self.runner.proposed(step))
        self.runner.sample(step, masks)
        return [self.scheduler.fail(rows[row], failure(rows[row], error), self._clock())
                for row, error in failed.items()]

    def drain(self) -> list[TokenChunk]:
        """Reads and commits what is in flight, without planning more. Raises as `step`."""
        finished, self._in_flight = self._in_flight, None
        chunks: list[TokenChunk] = []
        try:
            if finished is not None:
                self._commit(finished, chunks)
        except Exception as error:
            self._recover(error)
        return chunks

    def close(self) -> None:
        """Ends what runs beside the engine: the connection to a drafter elsewhere."""
        if self._remote is not None:
            self._remote.close()

    def _recover(self, error: Exception) -> None:
        """A failed step took the donated pages along: new pages, and every row recomputed from its tokens."""
        log.exception("device step failed; recomputing %d running rows", self.scheduler.num_running)
        now = self._clock()
        self._failures.append(now)
        self._in_flight = None
        traceback.clear_frames(error.__traceback__)  # what failed half-way may hold the next state of the device
        fault_point("reset")
        self.runner.reset()
        self.scheduler.requeue_all()
        if self._remote is not None:
            self._remote.forget_ended()
        if len(self._failures) == MAX_FAILURES and now - self._failures[0] < FAILURE_WINDOW:
            raise StepFailed(f"{MAX_FAILURES} device steps failed within {FAILURE_WINDOW:.0f} s; "
                             "the log has their errors") from error
