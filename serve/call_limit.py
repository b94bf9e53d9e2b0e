"""How many calls a server has in hand at once, over all connections."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from jaxinfer.errors import Overloaded
from serve.refusing import refusing
from serve.retry_hint import retry_hint

ALWAYS_PASS = (
    "/grpc.health.v1.Health/",  # a busy server that looks dead is taken out, and the others get its load too
    "/vllm.grpc.engine.VllmEngine/HealthCheck",  # the same question, as gateways ask it
    "/vllm.grpc.engine.VllmEngine/Abort",  # ends calls: without it a full server could not be relieved
)
"""Beginnings of the paths of calls that no limit holds back. What stands here must be cheap and wait for nothing: how
many there are at once is bounded by `max_streams` of each connection alone.
"""


class LimitCalls(grpc.aio.ServerInterceptor):
    """Refuses calls beyond `most` with RESOURCE_EXHAUSTED, but never those of ALWAYS_PASS. Lives on one event loop.

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
        if handler_call_details.method.startswith(ALWAYS_PASS):
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
