"""Between the event loop and the engine's thread: requests in, chunks out, one wake-up of the loop an engine step.

Everything but `Bridge.deliver` runs on the event loop, so streams need no locks.

The engine never waits for a reader: what a request has made is kept until it is read, and bounded by the request. It
may wait for the loop, which has to give what arrives to its requests: see `arrivals`.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace

from jaxinfer.core import EngineHandle
from jaxinfer.fault_points import fault_point
from jaxinfer.types import Request, TokenChunk
from serve.arrivals import PATIENCE_SECONDS, Arrivals
from serve.tenant import current_tenant

Consume = Callable[[TokenChunk], bool]
"""Takes a chunk when it arrives and tells whether the reader should look. It must bound what it keeps."""


def ignored(chunk: TokenChunk) -> bool:
    """Consumes what comes behind the end."""
    return False


class Stream:
    """One request on its way through the engine, as an async context manager.

    It ends exactly once: when the last sample has ended, when the engine gives the request up or the consumer fails
    (`wait` raises), or when the reader leaves, which cancels what still runs. What comes later is ignored.
    """

    __slots__ = ("_bridge", "_consume", "_error", "_news", "_reader", "_running", "_told", "request")

    def __init__(self, bridge: "Bridge", request: Request, consume: Consume):
        self.request = request
        self._bridge = bridge
        self._consume = consume
        self._running = set(range(request.params.n))
        self._news = False  # that the reader was not told of
        self._told = False  # it was, and reads
        self._reader: asyncio.Future[bool] | None = None
        self._error: BaseException | None = None

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # Reached however the reader leaves: at the end, by an error, CancelledError or GeneratorExit.
        self.cancel()

    @property
    def ended(self) -> bool:
        """Whether no more chunks can arrive."""
        return not self._running

    def put(self, chunk: TokenChunk) -> None:
        """Takes what the engine emitted."""
        if chunk.error is not None:
            self.fail(chunk.error)  # the other samples with it
        elif chunk.index in self._running:
            reader, self._reader = self._reader, None  # is told when all is taken in: a consumer may end its sample
            try:
                fault_point("consume", self.request.id)
                if self._consume(chunk) and not self._told:
                    self._news = True
            except BaseException as error:  # also a panic of a Rust library: it is this request's problem only
                self._reader = reader
                self.fail(error)
                return
            self._reader = reader
            if chunk.finish_reason is not None:
                self._end_sample(chunk.index)
            if self._news or not self._running:
                self._wake()

    def wait(self) -> Awaitable[bool]:
        """Waits until there is something to read, and says whether there is; then False for ever. Raises the error.

        Who was told reads all that is there, what comes meanwhile too, before it waits again. It is a future and no
        coroutine, which every message would make.
        """
        self._told = False
        reader = self._bridge.loop.create_future()
        if self._running and not self._news:
            self._reader = reader
        else:
            self._answer(reader)
        return reader

    def cancel_sample(self, index: int) -> None:
        """Ends one sample from our side (a stop string matched)."""
        if index in self._running:
            self._bridge.engine.cancel(self.request.id, index)
            self._end_sample(index)

    def fail(self, error: BaseException) -> None:
        """Ends the request from our side, with an error for the reader."""
        if self._running:
            self._bridge.engine.cancel(self.request.id)
            self._end(error)

    def cancel(self) -> None:
        """Ends the request from our side, for good."""
        if self._running:
            self._bridge.engine.cancel(self.request.id)
            self._end(None)

    def _end_sample(self, index: int) -> None:
        self._running.discard(index)
        if not self._running:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._running.clear()
        self._consume = ignored  # consumers refer to their stream: a circle that only the garbage collector would end
        self._error = error
        self._bridge.forget(self)
        self._wake()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            self._answer(reader)

    def _answer(self, reader: "asyncio.Future[bool]") -> None:
        if self._news:
            self._news, self._told = False, True
            reader.set_result(True)
        elif self._error is not None:
            reader.set_exception(self._error)
            reader.exception()  # a reader that leaves now does not take it, and nobody need hear of that
        else:
            reader.set_result(False)


class Bridge:
    """One for a loop and an engine. It is the one consumer of all its requests, so a step is one `deliver`."""

    def __init__(self, engine: EngineHandle, loop: asyncio.AbstractEventLoop, patience: float = PATIENCE_SECONDS):
        """patience: seconds that the engine waits for a loop which takes nothing."""
        self.engine = engine
        self.loop = loop
        self._streams: dict[str, Stream] = {}
        self._numbers = itertools.count(1)
        self._arrivals = Arrivals(loop, self._distribute, patience)

    @property
    def num_streams(self) -> int:
        """Requests that run or wait in the engine."""
        return len(self._streams)

    def open(self, request: Request, consume: Consume) -> Stream:
        """Submits a request for the tenant of the running call. Raises Overloaded or EngineClosed.

        The engine knows it by a name that is used once: clients repeat their ids, and a chunk of the old request must
        never reach the new one.
        """
        request = replace(request, id=f"{request.id}/{next(self._numbers)}", tenant=current_tenant())
        stream = self._streams[request.id] = Stream(self, request, consume)
        try:
            self.engine.submit(request, self)
        except BaseException:
            self.forget(stream)
            raise
        return stream

    def forget(self, stream: Stream) -> None:
        """Chunks of this stream are ignored from now on."""
        self._streams.pop(stream.request.id, None)

    def fail_all(self, error: Exception) -> None:
        """Ends every request with `error`, in the engine too."""
        for stream in list(self._streams.values()):
            stream.fail(error)

    def deliver(self, chunks: list[TokenChunk]) -> None:
        """Takes a step's chunks, on the engine's thread. Raises as `Arrivals.put`: then the engine must drop them."""
        self._arrivals.put(chunks)

    def close(self) -> None:
        """Once the engine delivers no more."""
        self._arrivals.close()

    def _distribute(self, chunks: list[TokenChunk]) -> None:
        # All streams' texts and messages are made here, one after the other, before any of them is sent: doing the
        # same work many times over is much cheaper than doing it between the sends, with cold caches.
        streams = self._streams
        for chunk in chunks:
            stream = streams.get(chunk.request_id)
            if stream is not None:
                stream.put(chunk)
