"""A service on a real loopback port, in a thread with a loop of its own."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from counting_engine import CountingEngine

from jaxinfer.core import Core
from serve.client import Client
from serve.event_loop import new_event_loop
from serve.server import Server, ServerConfig


@dataclass
class Served:
    """A running server and what a test needs of it."""

    server: Server
    core: Core | None
    client: Client
    loop: asyncio.AbstractEventLoop

    @property
    def engine(self) -> CountingEngine:
        assert self.core is not None
        engine = self.core.engine
        assert isinstance(engine, CountingEngine)
        return engine

    def call(self, coroutine: Any) -> Any:
        """Runs a coroutine on the server's loop."""
        return self.start(coroutine).result(timeout=10)

    def start(self, coroutine: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


@contextlib.contextmanager
def serving(core: Core | None, drain_seconds: float = 0.2, *, connect: Mapping[str, Any] | None = None,
            **settings: Any) -> Iterator[Served]:
    """Serves `core`; without one the server stays in its loading state. connect: arguments of its client; settings: of
    its `ServerConfig`.
    """
    loop = new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def begin() -> Server:
        server = Server(ServerConfig(port=0, drain_seconds=drain_seconds, **settings))
        await server.start()
        if core is not None:
            await server.ready(core)
        return server

    server = asyncio.run_coroutine_threadsafe(begin(), loop).result(timeout=10)
    try:
        with Client(server.address, **(connect or {})) as client:
            yield Served(server, core, client, loop)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def eventually(condition: Callable[[], object], timeout: float = 5.0) -> float:
    """Waits until `condition()` holds; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout:
            raise AssertionError("the condition never held")
        time.sleep(0.001)
    return time.monotonic() - began
