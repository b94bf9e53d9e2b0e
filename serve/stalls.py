"""Streams whose client does not read: ended after a while, so that nothing is kept for them.

The engine never waits for a reader, stalled or not: what it makes is kept as messages (`codec.Outbox`). A write that
gRPC does not take means that its own buffers for the stream are full, and that the client has not read meanwhile.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from serve.malformed import send

log = logging.getLogger(__name__)

CHECKS = 10
"""Looks at all streams in a timeout: one is ended at most a tenth of it late."""
LAST_WORD_SECONDS = 1.0
"""For gRPC to take the status; it is sent when the client reads again, and does not hold the call meanwhile."""

Context = grpc.aio.ServicerContext


class WatchedContext:
    """A call's context that notes since when a write waits.

    has_status: the handler itself has ended the call. was_stalled: `end` was called.
    """

    __slots__ = ("_context", "_has_begun", "_now", "_task", "has_status", "was_stalled", "writing_since")

    def __init__(self, context: Context, loop: asyncio.AbstractEventLoop):
        self._context = context
        self._now = loop.time
        self._task = asyncio.current_task()
        self.writing_since = math.inf  # nothing waits
        self._has_begun = False
        self.has_status = False
        self.was_stalled = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def send_initial_metadata(self, metadata: Any) -> None:
        self._has_begun = True
        await self._context.send_initial_metadata(metadata)

    async def write(self, message: Any) -> None:
        self.writing_since = self._now()
        if not self._has_begun:  # by itself: gRPC could not end a call whose first message waits with the headers
            await self.send_initial_metadata(())
        await self._context.write(message)
        self.writing_since = math.inf

    async def abort(self, *args: Any, **kwargs: Any) -> None:
        self.has_status, self.writing_since = True, self._now()  # it waits behind what was written
        await self._context.abort(*args, **kwargs)

    def end(self) -> None:
        """Cancels the handler, which frees what it holds as for any other reason to leave."""
        self.was_stalled = True
        if self._task is not None:
            self._task.cancel()


class EndStalled(grpc.aio.ServerInterceptor):
    """Ends streams that were not read for `timeout` seconds, with DEADLINE_EXCEEDED. Lives on one event loop.

    It must come before interceptors whose handlers read bytes, as `RefuseMalformed`.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._running: set[WatchedContext] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]],
                                handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            return handler
        method = handler_call_details.method
        answer = handler.stream_stream or handler.unary_stream

        async def watched(request: bytes | AsyncIterator[bytes], context: Context) -> None:
            await self._run(answer, request, context, method)

        make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else (
            grpc.unary_stream_rpc_method_handler)
        return make(watched, handler.request_deserializer, handler.response_serializer)

    async def _run(self, answer: Callable[[Any, Any], Any], request: Any, context: Context, method: str) -> None:
        loop = asyncio.get_running_loop()
        watched = WatchedContext(context, loop)
        seen: Any = watched
        self._running.add(watched)
        if self._timer is None:
            self._timer = loop.call_later(self._timeout / CHECKS, self._check, loop)
        try:
            await send(answer(request, seen), seen)
        except asyncio.CancelledError:
            if watched.was_stalled and not watched.has_status:
                await self._say(context, method)
            raise
        finally:
            self._running.discard(watched)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        limit = loop.time() - self._timeout
        for watched in self._running:
            if watched.writing_since < limit and not watched.was_stalled:
                watched.end()
        again = bool(self._running)
        self._timer = loop.call_later(self._timeout / CHECKS, self._check, loop) if again else None

    async def _say(self, context: Context, method: str) -> None:
        text = f"nothing of this stream was read for {self._timeout:g} s, the limit; read it as it comes"
        log.warning("a stream of %s was ended: its client did not read for %g s", method, self._timeout)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text), LAST_WORD_SECONDS)
