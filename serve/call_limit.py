"""How many calls a server has in hand at once, over all connections."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from jaxinfer.errors import Overloaded
from serve.authentication import OPEN_PREFIX
from serve.refusing import refusing
from serve.retry_hint import retry_hint


class LimitCalls(grpc.aio.ServerInterceptor):
    """Refuses calls beyond `most` with RESOURCE_EXHAUSTED; those of health always pass. Lives on one event loop.

    The engine's queue is bounded by itself. This bounds what is on its way there or back: requests that are read,
    rendered and tokenised, answers that are not fetched.
    """

    def __init__(self, most: int, ended: Counter[str]):
        """ended: calls by status, where refusals are counted."""
        self._most = most
        self._ended = ended
        self._running = 0

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]],
                                handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method.startswith(OPEN_PREFIX):
            return await continuation(handler_call_details)
        if self._running >= self._most:
            error = Overloaded(f"{self._running} calls are running, the limit is {self._most}; try again later or "
                               "raise max_calls")
            self._ended["RESOURCE_EXHAUSTED"] += 1
            return refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry_hint(error))
        task = asyncio.current_task()
        if task is not None:  # gRPC's, which ends with the call
            self._running += 1
            task.add_done_callback(self._leave)
        return await continuation(handler_call_details)

    def _leave(self, _: object) -> None:
        self._running -= 1
