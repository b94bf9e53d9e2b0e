"""What has arrived of the engine and was given to no request yet is bounded; the engine is not held up for good."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator

import pytest
from counting_engine import CountingEngine
from paged_engine import paged_core
from serving import eventually

from jaxinfer.errors import DeliveryFailed, EngineClosed
from jaxinfer.types import Request, SamplingParams, TokenChunk
from serve import arrivals
from serve.arrivals import MOST_STEPS_BEHIND
from serve.bridge import Bridge, Stream

ENDLESS = 10_000_000
FOR_EVER = 3600.0


def opened(bridge: Bridge, consume: Callable[[TokenChunk], bool], name: str = "r", max_tokens: int = ENDLESS) -> Stream:
    return bridge.open(Request(id=name, prompt=(10,), params=SamplingParams(), max_tokens=max_tokens, seed=1), consume)


class Stepping(threading.Thread):
    """Steps an engine as fast as it can, and keeps what a step raised."""

    def __init__(self, engine: CountingEngine, num_steps: int):
        super().__init__(daemon=True)
        self._engine = engine
        self._num_steps = num_steps
        self.num_done = 0
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            for _ in range(self._num_steps):
                self._engine.step()
                self.num_done += 1
        except (EngineClosed, DeliveryFailed) as error:
            self.error = error


def run(test: Callable[[], Coroutine]) -> None:
    asyncio.run(test())


def test_an_engine_faster_than_the_loop_waits_for_it():
    """The loop gives chunks out slower than they are made; nothing is lost, and no more waits than may."""
    async def test() -> None:
        engine = CountingEngine()
        bridge = Bridge(engine, asyncio.get_running_loop(), patience=FOR_EVER)
        seen, lengths = [], []

        def consume(chunk: TokenChunk) -> bool:
            stepping.join(0.0005)
            seen.extend(chunk.token_ids)
            lengths.append(len(bridge._arrivals))
            return True

        stream = opened(bridge, consume, max_tokens=500)
        stepping = Stepping(engine, 500)
        while await stream.wait():
            pass
        stepping.join()
        assert stepping.error is None and len(seen) == 500
        assert seen == [(10 + step) % 257 for step in range(1, 501)]
        assert max(lengths) <= MOST_STEPS_BEHIND

    run(test)


def test_the_loop_serves_others_however_much_arrives():
    """Whatever is given out has the next step arrive at once, as of an engine that is always faster."""
    async def test() -> None:
        bridge = Bridge(CountingEngine(), asyncio.get_running_loop())
        seen: list[TokenChunk] = []

        def consume(chunk: TokenChunk) -> bool:
            seen.append(chunk)
            if len(seen) < 100:
                bridge.deliver([chunk])
            return True

        stream = opened(bridge, consume)
        bridge.deliver([TokenChunk(stream.request.id, 0, [1])])
        turns = 0
        while len(seen) < 100:
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 100

    run(test)


@contextlib.contextmanager
def held_up(engine: CountingEngine) -> Iterator[Stepping]:
    """An engine that has delivered all it may to a loop that takes nothing, here because it is in this block."""
    stepping = Stepping(engine, ENDLESS)
    eventually(lambda: stepping.num_done == MOST_STEPS_BEHIND)
    yield stepping


def test_a_loop_that_takes_nothing_costs_the_requests_and_not_the_engine():
    async def test() -> None:
        engine = CountingEngine()
        bridge = Bridge(engine, asyncio.get_running_loop(), patience=0.01)
        seen: list[TokenChunk] = []
        streams = [opened(bridge, lambda chunk: not seen.append(chunk), name) for name in ("one", "two")]
        with held_up(engine) as stepping:
            stepping.join()
            assert isinstance(stepping.error, DeliveryFailed) and len(bridge._arrivals) == MOST_STEPS_BEHIND + 1
            engine.rows.clear()  # what the engine's thread does with the requests of a consumer that failed
        for stream in streams:
            assert await stream.wait(), "what had arrived is there"
            with pytest.raises(DeliveryFailed, match=r"no tokens for 0\.01 s and is 32 steps behind"):
                await stream.wait()
        assert len(seen) == 2 * MOST_STEPS_BEHIND and bridge.num_streams == 0
        last = opened(bridge, lambda chunk: True, "next", max_tokens=1)
        await asyncio.to_thread(engine.step)
        assert await last.wait() and not await last.wait()

    run(test)


def test_the_engines_thread_drops_what_was_not_taken_and_serves_on(monkeypatch: pytest.MonkeyPatch):
    """The real thread, scheduler and pages."""
    monkeypatch.setattr(arrivals, "MOST_STEPS_BEHIND", 2)
    core = paged_core()

    async def test() -> None:
        bridge = Bridge(core.engine, asyncio.get_running_loop(), patience=0.01)
        stream = opened(bridge, lambda chunk: True, max_tokens=200)
        eventually(lambda: core.engine.metrics()["decode_steps"] > 0)
        eventually(lambda: core.engine.load().num_running == 0)  # the loop stands still here
        assert core.engine.load().pages_used == 0
        assert await stream.wait()
        with pytest.raises(DeliveryFailed):
            await stream.wait()
        last = opened(bridge, lambda chunk: True, max_tokens=2)
        while await last.wait():
            pass
        await asyncio.to_thread(core.engine.close)
        bridge.close()

    run(test)


def test_closing_tells_an_engine_that_waits():
    async def test() -> None:
        engine = CountingEngine()
        bridge = Bridge(engine, asyncio.get_running_loop(), patience=FOR_EVER)
        opened(bridge, lambda chunk: True)
        with held_up(engine) as stepping:
            bridge.close()
            stepping.join(5)
            assert isinstance(stepping.error, EngineClosed) and not stepping.is_alive()

    run(test)


def test_a_loop_that_was_closed_tells_an_engine_that_waits():
    found: list[Stepping] = []

    async def test() -> None:
        engine = CountingEngine()
        opened(Bridge(engine, asyncio.get_running_loop(), patience=FOR_EVER), lambda chunk: True)
        with held_up(engine) as stepping:
            found.append(stepping)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(test())
    loop.close()
    found[0].join(5)
    assert isinstance(found[0].error, EngineClosed)


def test_readers_are_not_waited_for():
    """Nobody reads, and the loop is free: the engine goes on to the end."""
    async def test() -> None:
        engine = CountingEngine()
        bridge = Bridge(engine, asyncio.get_running_loop(), patience=0.0)
        opened(bridge, lambda chunk: True, max_tokens=2000)
        while engine.rows:
            await asyncio.to_thread(engine.step)
        assert engine.num_steps == 2000

    run(test)


def test_a_loop_that_comes_back_meanwhile_hears_of_what_was_dropped(monkeypatch: pytest.MonkeyPatch):
    """Between the engine's last look and its word the loop takes all that waits, and would sleep."""
    asked, go_on, real = threading.Event(), threading.Event(), arrivals.failures

    def slow(*arguments):
        asked.set()
        go_on.wait(5)
        return real(*arguments)

    monkeypatch.setattr(arrivals, "failures", slow)

    async def test():
        engine = CountingEngine()
        bridge = Bridge(engine, asyncio.get_running_loop(), patience=0.05)
        stream = opened(bridge, lambda chunk: True)
        with held_up(engine) as stepping:
            assert asked.wait(5)
        while len(bridge._arrivals):
            await asyncio.sleep(0)
        go_on.set()
        stepping.join(5)
        engine.rows.clear()
        with pytest.raises(DeliveryFailed):
            async with asyncio.timeout(5):
                while await stream.wait():
                    pass

    run(test)
