"""An engine that costs next to nothing, so that what a server's process takes is the server."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.core import Consumer, Load
from jaxinfer.types import Request, RequestStats, TokenChunk

VOCAB_SIZE = 4096
MAX_MODEL_LEN = 4096
PACE_SECONDS = 0.02

COUNTING = [*range(VOCAB_SIZE), *range(MAX_MODEL_LEN)]
"""What comes after an id, however far a request may go."""

ReadyTimes = dict[str, list[float]]
"""Request id to the time (time.monotonic) at which each of its messages became ready."""


@dataclass(slots=True)
class _Row:
    request: Request
    consumer: Consumer
    chunks: Iterator[TokenChunk]
    stats: RequestStats
    ready: list[float] = field(default_factory=list)


class CountingEngine:
    """An EngineHandle whose next token is (last + 1) mod V, `tokens_per_step` a step and row, at a fixed pace.

    It must cost little, since it is not what is measured: all chunks of a request are made when it comes, and nothing
    runs while no request does. `cpu_seconds` says what it costs all the same.
    """

    def __init__(self, tokens_per_step: int = 1):
        self.ready: ReadyTimes = {}
        self.tokens_per_step = tokens_per_step
        self._rows: dict[str, _Row] = {}
        self._wake = threading.Condition()
        self._closed = False
        self.alive = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, consumer: Consumer) -> None:
        stats = RequestStats(arrival=request.arrival, num_prompt_tokens=len(request.prompt))
        row = _Row(request, consumer, iter(chunks_of(request, stats, self.tokens_per_step)), stats)
        self.ready[request.id.rpartition("/")[0]] = row.ready
        with self._wake:
            self._rows[request.id] = row
            self._wake.notify()

    def cancel(self, request_id: str, index: int | None = None) -> None:
        with self._wake:
            self._rows.pop(request_id, None)

    def check_room(self, num_samples: int) -> None:
        """There always is."""

    def progress(self) -> int | None:
        return None

    def load(self) -> Load:
        return Load(len(self._rows), 0, 0, 0, 0, 1)

    def metrics(self) -> dict[str, Any]:
        return {}

    def run(self, work: Callable[[Any], Any]) -> Any:
        return work(self)

    def cpu_seconds(self) -> float:
        """Of its thread so far: its steps, and handing their chunks to the service."""
        assert self._thread.ident is not None  # noqa: S101 (it was started)
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            if not self._rows:
                with self._wake:
                    self._wake.wait_for(lambda: self._rows or self._closed)
            if self._closed:
                return
            now = time.monotonic()
            due = max(due + PACE_SECONDS, now)
            time.sleep(due - now)
            self._step(list(self._rows.values()))

    def _step(self, rows: list[_Row]) -> None:
        if not rows:
            return
        now = time.monotonic()
        chunks: list[TokenChunk] = []
        for row in rows:
            chunk = next(row.chunks)
            chunks.append(chunk)
            row.ready.append(now)
            if chunk.finish_reason is not None:
                row.stats.scheduled, row.stats.first_token, row.stats.finished = row.ready[0], row.ready[0], now
                self._rows.pop(row.request.id, None)
        rows[0].consumer.deliver(chunks)  # the service is one consumer


def chunks_of(request: Request, stats: RequestStats, tokens_per_step: int) -> list[TokenChunk]:
    """All that the engine will say of a request."""
    first = request.prompt[-1] + 1
    starts = range(first, first + request.max_tokens, tokens_per_step)
    chunks = [TokenChunk(request.id, 0, COUNTING[start:start + tokens_per_step]) for start in starts]
    chunks[-1].finish_reason, chunks[-1].stats = "length", stats
    return chunks
