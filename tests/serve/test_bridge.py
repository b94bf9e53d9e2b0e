"""The hand-over between threads: wake-ups, endings, what is ignored."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine

import pytest
from counting_engine import CountingEngine

from jaxinfer.errors import EngineClosed, StepFailed
from jaxinfer.types import Request, SamplingParams, TokenChunk
from serve.bridge import Bridge, Stream


class Bridged:
    """A bridge, its engine, and the chunks that its streams consumed."""

    def __init__(self):
        self.engine = CountingEngine()
        self.bridge = Bridge(self.engine, asyncio.get_running_loop())
        self.consumed: list[TokenChunk] = []
        self.num_wake_ups = 0
        wake = self.bridge._arrivals._doorbell._wake

        def counted() -> None:
            self.num_wake_ups += 1
            wake()

        self.bridge._arrivals._doorbell._wake = counted  # pyright: ignore[reportAttributeAccessIssue]

    def open(self, name: str = "r", n: int = 1, max_tokens: int = 3) -> Stream:
        return self.bridge.open(request(name, n, max_tokens), self.consume)

    def consume(self, chunk: TokenChunk) -> bool:
        self.consumed.append(chunk)
        return True

    async def step(self) -> None:
        """A step on another thread, as in life."""
        await asyncio.to_thread(self.engine.step)


def request(name: str, n: int, max_tokens: int) -> Request:
    return Request(id=name, prompt=(10,), params=SamplingParams(n=n), max_tokens=max_tokens, seed=1)


def run(test: Callable[[], Coroutine]) -> None:
    asyncio.run(test())


@pytest.fixture(autouse=True, params=["eventfd", "socket pair"])
def way_to_wake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "socket pair":
        monkeypatch.delattr(os, "eventfd", raising=False)
    elif not hasattr(os, "eventfd"):
        pytest.skip("this system has no eventfd")


def test_one_wake_up_a_step_for_all_streams():
    async def test() -> None:
        it = Bridged()
        streams = [it.open(str(number)) for number in range(50)]
        await it.step()
        assert it.num_wake_ups == 1
        assert all([await stream.wait() for stream in streams])
        assert len(it.consumed) == 50

    run(test)


def test_a_lagging_loop_is_woken_once_for_many_steps():
    async def test() -> None:
        it = Bridged()
        stream = it.open(max_tokens=10)
        thread = threading.Thread(target=lambda: [it.engine.step() for _ in range(10)])
        thread.start()
        thread.join()  # the loop has not run since
        assert it.num_wake_ups == 1
        assert await stream.wait()
        assert [id for chunk in it.consumed for id in chunk.token_ids] == list(range(11, 21))
        assert not await stream.wait() and not await stream.wait()

    run(test)


def test_the_end_is_reached_once_and_late_chunks_are_ignored():
    async def test() -> None:
        it = Bridged()
        stream = it.open(max_tokens=1)
        await it.step()
        assert await stream.wait() and not await stream.wait() and stream.ended
        assert it.bridge.num_streams == 0
        stream.put(TokenChunk(stream.request.id, 0, [99]))
        it.bridge.deliver([TokenChunk(stream.request.id, 0, [99]), TokenChunk("stranger", 0, [1])])
        await asyncio.sleep(0)
        stream.cancel()
        stream.fail(EngineClosed("late"))
        assert not await stream.wait()
        assert len(it.consumed) == 1 and it.engine.cancelled == []

    run(test)


@pytest.mark.parametrize("leave", [asyncio.CancelledError, GeneratorExit, RuntimeError])
def test_leaving_the_context_cancels_once(leave: type[BaseException]):
    async def test() -> None:
        it = Bridged()
        with pytest.raises(leave):
            async with it.open("x", n=2):
                raise leave
        assert it.engine.cancelled == [("x", None)] and it.bridge.num_streams == 0

    run(test)


def test_cancelling_the_reader_cancels_the_request():
    async def test() -> None:
        it = Bridged()

        async def read() -> None:
            async with it.open("x") as stream:
                await stream.wait()

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert it.engine.cancelled == [("x", None)]

    run(test)


def test_a_sample_ends_alone():
    async def test() -> None:
        it = Bridged()
        stream = it.open("x", n=2)
        stream.cancel_sample(1)
        stream.cancel_sample(1)
        assert it.engine.cancelled == [("x", 1)] and not stream.ended
        await it.step()
        await stream.wait()
        assert [chunk.index for chunk in it.consumed] == [0]
        stream.cancel_sample(0)
        assert stream.ended and it.bridge.num_streams == 0

    run(test)


def test_errors_come_after_what_was_there():
    async def test() -> None:
        it = Bridged()
        stream = it.open(n=2)
        await it.step()
        it.engine.fail(StepFailed("no more"))
        assert await stream.wait()
        for _ in range(2):
            with pytest.raises(StepFailed, match="no more"):
                await stream.wait()
        assert it.engine.cancelled == []

    run(test)


def test_an_error_of_one_sample_ends_the_others_too():
    async def test() -> None:
        it = Bridged()
        stream = it.open("x", n=3)
        failed = it.engine.rows.pop((stream.request.id, 1))
        error = StepFailed("its own")
        failed.consumer.deliver([TokenChunk(stream.request.id, 1, [], finish_reason="error", error=error)])
        with pytest.raises(StepFailed, match="its own"):
            await stream.wait()
        assert it.engine.cancelled == [("x", None)] and not it.engine.rows

    run(test)


def test_a_failing_consumer_fails_its_own_request():
    async def test() -> None:
        it = Bridged()

        def broken(chunk: TokenChunk) -> bool:
            raise ValueError("mine")

        bad, good = it.bridge.open(request("bad", 1, 3), broken), it.open("good")
        await it.step()
        assert await good.wait()
        with pytest.raises(ValueError, match="mine"):
            await bad.wait()
        assert it.engine.cancelled == [("bad", None)]

    run(test)


def test_fail_all():
    async def test() -> None:
        it = Bridged()
        streams = [it.open(str(number)) for number in range(3)]
        it.bridge.fail_all(EngineClosed("stopped"))
        for stream in streams:
            with pytest.raises(EngineClosed):
                await stream.wait()
        assert len(it.engine.cancelled) == 3 and not it.engine.rows

    run(test)


def test_equal_ids_do_not_meet():
    async def test() -> None:
        it = Bridged()
        first, second = it.open("same"), it.open("same")
        assert first.request.id != second.request.id
        first.cancel()
        await it.step()
        assert await second.wait() and len(it.consumed) == 1

    run(test)


def test_a_refused_request_leaves_nothing_behind():
    async def test() -> None:
        it = Bridged()
        it.engine.close()
        with pytest.raises(EngineClosed):
            it.open()
        assert it.bridge.num_streams == 0

    run(test)


def test_delivering_to_a_closed_bridge_tells_the_engine():
    async def test() -> None:
        it = Bridged()
        it.open()
        it.bridge.close()
        it.bridge.close()
        with pytest.raises(EngineClosed):
            await it.step()

    run(test)


def test_no_delivery_is_lost_between_threads():
    """Thousands of deliveries at full speed against a loop that distributes at the same time."""
    async def test() -> None:
        it = Bridged()
        stream = it.open(max_tokens=5000)
        thread = threading.Thread(target=lambda: [it.engine.step() for _ in range(5000)])
        thread.start()
        while await stream.wait():
            pass
        thread.join()
        assert sum(len(chunk.token_ids) for chunk in it.consumed) == 5000
        it.bridge.close()

    run(test)


def test_delivering_to_a_closed_loop_tells_the_engine():
    found: list[Bridged] = []

    async def test() -> None:
        found.append(Bridged())
        found[0].open()

    run(test)
    with pytest.raises(EngineClosed):
        found[0].engine.step()
