"""The loop is open: nobody waits for an answer to be sent, and waiting counts from when a request was due."""

import asyncio
import time

import pytest

from serve.bench.open_loop import open_loop
from serve.bench.record import Record
from serve.bench.results import Run

OFFSETS = [0.0, 0.001, 0.002, 0.003, 0.03]


def run(send, offsets=OFFSETS, **options) -> Run:
    return asyncio.run(asyncio.wait_for(open_loop(offsets, send, **options), 10))


async def brief(number, record: Record, clock) -> None:
    record.sent = clock()
    await asyncio.sleep(0.002)
    record.ended, record.status = clock(), "OK"


def test_all_are_sent_before_the_first_is_answered():
    sent, all_sent = [], asyncio.Event()

    async def send(number, record, clock):
        record.sent = clock()
        sent.append(number)
        if len(sent) == len(OFFSETS):
            all_sent.set()
        await all_sent.wait()  # for ever, in a loop that waits for answers
        record.ended = clock()

    done = run(send)
    assert sent == [0, 1, 2, 3, 4]
    assert [record.due for record in done.records] == OFFSETS
    assert all(record.due <= record.handed <= record.sent < record.ended for record in done.records)
    assert done.duration == max(record.ended for record in done.records) >= OFFSETS[-1]


def test_who_waits_for_room_was_due_all_the_same():
    done = run(brief, max_concurrency=1)
    for earlier, later in zip(done.records, done.records[1:], strict=False):
        assert later.sent >= earlier.ended
    assert [record.due for record in done.records] == OFFSETS
    crowded = done.records[3]
    assert crowded.client_queue_time >= 3 * 0.002 - OFFSETS[3]
    assert crowded.e2el >= 4 * 0.002 - OFFSETS[3]
    assert crowded.lag <= crowded.client_queue_time


def test_in_a_closed_loop_a_request_is_due_when_its_turn_comes():
    done = run(brief, [0.0] * 4, max_concurrency=1, closed=True)
    assert all(record.due >= earlier.ended for earlier, record in zip(done.records, done.records[1:], strict=False))
    assert all(record.lag == 0 for record in done.records)


def test_a_generator_that_is_late_says_so():
    async def blocks(number, record, clock):
        record.sent = clock()
        if number == 0:
            time.sleep(0.05)
        record.ended = clock()

    done = run(blocks, [0.0, 0.01, 0.2])
    assert done.records[1].lag >= 0.03
    assert done.records[1].ttft == 0 and done.records[1].e2el >= 0.03
    assert max(done.loop_lags) >= 0.03


def test_a_defect_of_the_client_is_not_hidden():
    async def broken(number, record, clock):
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        run(broken)


def test_nothing_to_do():
    assert run(brief, []).records == []
