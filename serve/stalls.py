"""Calls whose client does not read: ended after a while, so that they hold no place.

The engine never waits for a reader, stalled or not: what it makes is kept as messages (`codec.Outbox`). A write that
gRPC does not take means that its own buffers for the stream are full, and that the client has not read meanwhile.
A call that waits for the engine writes nothing, and is not stalled however long that takes.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from inspect import markcoroutinefunction
from typing import Any

import grpc

from serve.malformed import sent

log = logging.getLogger(__name__)

CHECKS = 10
"""Looks at all streams in a timeout: one is ended at most a tenth of it late."""
LAST_WORD_SECONDS = 1.0
"""For gRPC to take the status; it is sent when the client reads again, and does not hold the call meanwhile."""

Context = grpc.aio.ServicerContext


class WatchedContext:
    """A call's context that knows since when a write waits.

    Nothing of ours stands between a handler and gRPC's write, which every message would pass twice: whether the write
    still waits is asked of its coroutine, and only when somebody looks.

    has_status: the handler itself has ended the call. was_stalled: `end` was called.
    """

    __slots__ = ("_began", "_context", "_has_begun", "_now", "_task", "_writing", "has_status", "was_stalled")

    def __init__(self, context: Context, loop: asyncio.AbstractEventLoop):
        self._context = context
        self._now = loop.time
        self._task = asyncio.current_task()
        self._writing: Any = None  # the newest write or abort, a coroutine
        self._began = 0.0  # when it did
        self._has_begun = False
        self.has_status = False
        self.was_stalled = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def waits_since(self) -> float:
        """When the write began that gRPC has not taken yet; infinity where there is none."""
        return math.inf if self._writing is None or self._writing.cr_await is None else self._began

    async def send_initial_metadata(self, metadata: Any) -> None:
        self._has_begun = True
        await self._context.send_initial_metadata(metadata)

    def write(self, message: Any) -> Awaitable[None]:
        self._began = self._now()
        self._writing = self._context.write(message) if self._has_begun else self._write_first(message)
        return self._writing

    async def _write_first(self, message: Any) -> None:
        """Behind the headers by themselves: gRPC could not end a call whose first message waits with them."""
        await self.send_initial_metadata(())
        await self._context.write(message)

    async def abort(self, *args: Any, **kwargs: Any) -> None:
        self.has_status, self._began = True, self._now()  # it waits behind what was written
        self._writing = self._context.abort(*args, **kwargs)
        await self._writing

    def end(self) -> None:
        """Cancels the handler, which frees what it holds as for any other reason to leave."""
        self.was_stalled = True
        if self._task is not None:
            self._task.cancel()


class Answer:
    """The one message of a call that is no stream, from when it is gRPC's to write until the call's task has ended."""

    __slots__ = ("_method", "_task", "waits_since", "was_stalled")

    def __init__(self, method: str, task: asyncio.Task[Any], now: float):
        self._method = method
        self._task = task
        self.waits_since = now
        self.was_stalled = False

    def end(self) -> None:
        """Gives up the call's place. gRPC has the message, and hands it out should the client still read it."""
        self.was_stalled = True
        self._task.cancel()
        log.warning("an answer of %s was given up: its client did not read it", self._method)


class EndStalled(grpc.aio.ServerInterceptor):
    """Ends calls that were not read for `timeout` seconds, streams with DEADLINE_EXCEEDED. Lives on one event loop.

    An answer that is no stream is written by gRPC as a whole, its status behind it, so no other status can be sent: the
    call ends here only, and what it held is free but for the bytes of that answer.

    It must come before interceptors whose handlers read bytes, as `RefuseMalformed`.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._running: set[WatchedContext | Answer] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]],
                                handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not handler.response_streaming:
            return self._answering(handler, method)
        answer = handler.stream_stream or handler.unary_stream

        def watched(request: bytes | AsyncIterator[bytes], context: Context) -> Awaitable[None]:
            return self._run(answer, request, context, method)

        make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else (
            grpc.unary_stream_rpc_method_handler)
        return make(markcoroutinefunction(watched), handler.request_deserializer, handler.response_serializer)

    def _answering(self, handler: Any, method: str) -> grpc.RpcMethodHandler | None:
        """Of one request and one answer; we have no calls that take a stream and answer once."""
        if handler is None or handler.unary_unary is None:
            return handler

        async def watched(request: bytes, context: Context) -> Any:
            response = await handler.unary_unary(request, context)
            self._watch_answer(method)
            return response

        return grpc.unary_unary_rpc_method_handler(watched, handler.request_deserializer, handler.response_serializer)

    def _watch_answer(self, method: str) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is None:
            return
        answer = Answer(method, task, loop.time())
        self._running.add(answer)
        task.add_done_callback(lambda _: self._running.discard(answer))
        self._look_later(loop)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None:
            self._timer = loop.call_later(self._timeout / CHECKS, self._check, loop)

    async def _run(self, answer: Callable[[Any, Any], Any], request: Any, context: Context, method: str) -> None:
        loop = asyncio.get_running_loop()
        watched = WatchedContext(context, loop)
        seen: Any = watched
        self._running.add(watched)
        self._look_later(loop)
        try:
            await sent(answer(request, seen), seen)
        except asyncio.CancelledError:
            if watched.was_stalled and not watched.has_status:
                await self._say(context, method)
            raise
        finally:
            self._running.discard(watched)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        limit = loop.time() - self._timeout
        for watched in self._running:
            if watched.waits_since < limit and not watched.was_stalled:
                watched.end()
        self._timer = None
        if self._running:
            self._look_later(loop)

    async def _say(self, context: Context, method: str) -> None:
        text = f"nothing of this stream was read for {self._timeout:g} s, the limit; read it as it comes"
        log.warning("a stream of %s was ended: its client did not read for %g s", method, self._timeout)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text), LAST_WORD_SECONDS)
