"""An open loop: requests are sent when they are due, whether or not earlier ones have been answered."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from serve.bench.record import Record
from serve.bench.results import Run

TICK_SECONDS = 0.01

Send = Callable[[int, Record, Callable[[], float]], Awaitable[None]]
"""Sends request `number`, fills its record, with times of the clock; raises nothing of the request's own."""


async def open_loop(offsets: Sequence[float], send: Send, *, max_concurrency: int | None = None,
                    closed: bool = False) -> Run:
    """offsets: when each request is due, in seconds from now, ascending.

    Over `max_concurrency` requests wait here. They are due all the same: what a user waits counts from then on. closed:
    there is no schedule, and a request is due when its turn comes.
    """
    room = asyncio.Semaphore(max_concurrency or len(offsets) or 1)
    began = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - began

    async def one(number: int, record: Record) -> None:
        async with room:
            if closed:
                record.due = record.handed = clock()
            await send(number, record, clock)

    records = [Record(due=offset) for offset in offsets]
    async with _watched_loop() as loop_lags, asyncio.TaskGroup() as tasks:
        for number, record in enumerate(records):
            await _until(record.due, clock)
            record.handed = clock()
            tasks.create_task(one(number, record))
    return Run(records, max((record.ended for record in records), default=0.0), loop_lags)


async def _until(due: float, clock: Callable[[], float]) -> None:
    """Sleeps, and lets others run even if it is late."""
    await asyncio.sleep(max(due - clock(), 0.0))


@asynccontextmanager
async def _watched_loop():
    """Yields a list that fills with how late, in seconds, a sleep on this event loop ends."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            lags.append(time.perf_counter() - due)

    watcher = asyncio.create_task(watch())
    try:
        yield lags
    finally:
        watcher.cancel()
