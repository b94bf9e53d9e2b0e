"""Calls of any of our services: counted while they run and when they end, and their errors as status codes.

The table of codes is `jaxinfer.errors`; only texts that we wrote ourselves reach a client.
"""

import asyncio
import logging
from collections import Counter
from typing import Self

import grpc

from jaxinfer import errors
from serve import request_log
from serve.generation import Generation
from serve.retry_hint import retry_hint

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext
LEAVING = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


class Calls:
    """Counts the calls that run, and those that have ended by the name of their status (`ended`).

    One event loop writes; other threads may copy `ended` at any time. logs_requests: whether requests get a line in
    `request_log` when they end.
    """

    def __init__(self, *, logs_requests: bool = False):
        self.logs_requests = logs_requests
        self.num_running = 0
        self.ended: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self.num_running += 1
        self._idle.clear()

    def tell_end(self, code: str, request_id: str | None, generation: Generation | None) -> None:
        """Counts, and logs what was a request for tokens (one with an id, "" included)."""
        self.ended[code] += 1
        if self.logs_requests and request_id is not None:
            request_log.write(request_id, code, generation)

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
    generation: set by the body of a request for tokens once there is one, for the log.
    """

    __slots__ = ("_calls", "_context", "_request_id", "generation")

    def __init__(self, calls: Calls, context: Context, request_id: str | None = None):
        """request_id: the client's, of a request for tokens, "" if it has none; None for other calls."""
        self._calls = calls
        self._context = context
        self._request_id = request_id
        self.generation: Generation | None = None

    async def __aenter__(self) -> Self:
        self._calls.enter()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._calls.tell_end(code_of(self._context, error), self._request_id, self.generation)
            if error is not None and not isinstance(error, LEAVING):
                await refuse(self._context, error)
        finally:
            self._calls.leave()


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
