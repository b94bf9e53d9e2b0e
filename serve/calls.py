"""Calls of any of our services: counted while they run and when they end, and their errors as status codes.

The table of codes is `jaxinfer.errors`; only texts that we wrote ourselves reach a client.
"""

import asyncio
import logging
import time
from collections import Counter
from typing import Self

import grpc

from jaxinfer import errors
from serve.ended_request import EndedRequest, Observer
from serve.generation import Generation
from serve.retry_hint import retry_hint
from serve.tenant import current_tenant

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext
LEAVING = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


class Calls:
    """Counts the calls that run, and those that have ended by the name of their status (`ended`).

    One event loop writes; other threads may copy `ended` at any time. observers: told of every request for tokens that
    ends.
    """

    def __init__(self, observers: tuple[Observer, ...] = ()):
        self.observers = observers
        self.num_running = 0
        self.ended: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self.num_running += 1
        self._idle.clear()

    def tell(self, request: EndedRequest) -> None:
        """Hands it to the observers. What they raise is theirs: the request has its answer."""
        for observer in self.observers:
            try:
                observer(request)
            except Exception:
                log.exception("an observer of requests failed")

    def leave(self) -> None:
        self.num_running -= 1
        if not self.num_running:
            self._idle.set()

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until none runs; False when some still do after `timeout` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True


class Answering:
    """Around the body of a call: counts it as running, and turns what it raises into its status.

    A context manager and not a decorator: a decorated stream would pass every message through one more generator.
    generation: set by the body of a request for tokens once there is one, for the observers.
    """

    __slots__ = ("_began", "_calls", "_context", "_method", "_request_id", "generation")

    def __init__(self, calls: Calls, context: Context, method: str | None = None, request_id: str = ""):
        """method: "package.Service/Method" of a request for tokens, None for other calls; request_id: the client's."""
        self._calls = calls
        self._context = context
        self._method = method
        self._request_id = request_id
        self._began = time.monotonic()
        self.generation: Generation | None = None

    async def __aenter__(self) -> Self:
        self._calls.enter()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._tell_end(code_of(self._context, error), error)
            if error is not None and not isinstance(error, LEAVING):
                await refuse(self._context, error)
        finally:
            self._calls.leave()

    def _tell_end(self, code: str, error: BaseException | None) -> None:
        self._calls.ended[code] += 1
        if self._method is not None and self._calls.observers:
            field = error.field if isinstance(error, errors.InvalidRequest) else None
            self._calls.tell(EndedRequest(self._method, self._request_id, current_tenant(), code, field, self._began,
                                          self._context.invocation_metadata() or (), self.generation))


def code_of(context: Context, error: BaseException | None) -> str:
    """The name of the status that a call ends with."""
    if error is None:
        return "OK"
    if isinstance(error, grpc.aio.BaseError):
        return "CANCELLED"
    if not isinstance(error, LEAVING):
        return errors.status_of(error)[0]
    left = context.time_remaining()
    is_late = (left is not None and left <= 0) or getattr(context, "was_stalled", False)
    return "DEADLINE_EXCEEDED" if is_late else "CANCELLED"


async def refuse(context: Context, error: BaseException) -> None:
    """Ends the call with the error's status; only texts that we wrote ourselves reach the client."""
    if isinstance(error, grpc.aio.BaseError):  # the connection went away under a write: nobody is left to tell
        raise asyncio.CancelledError from error
    code, _, text = errors.status_of(error)
    if code == "INTERNAL":
        log.error("unexpected error in a call", exc_info=error)
    await context.abort(grpc.StatusCode[code], text, retry_hint(error))
