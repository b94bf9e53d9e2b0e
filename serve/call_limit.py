"""How many calls a server has in hand at once, over all connections, and whether its queue has room for one more."""

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
ASK_FOR_TOKENS = frozenset((
    "/jaxinfer.v1.GenerationService/Generate", "/jaxinfer.v1.GenerationService/GenerateStream",
    "/vllm.grpc.engine.VllmEngine/Generate"))  # fmt: skip
"""Paths of calls that a full queue refuses unread. `submit` counts exactly; here it takes 0.5 ms of CPU instead of 0.8
(4,000 calls by 16 callers beside other work, AMD EPYC, Python 3.12.1, grpcio 1.85.1, 2026-11-30), and of a flood that
is nearly all of the work.
"""


class LimitCalls(grpc.aio.ServerInterceptor):
    """Refuses calls with RESOURCE_EXHAUSTED beyond `most`, but never those of ALWAYS_PASS, and those that ask for
    tokens while `is_full` gives a reason. Lives on one event loop.

    The engine's queue is bounded by itself. `most` bounds what is on its way there or back: requests that are read,
    rendered and tokenised, answers that are not fetched.
    """

    def __init__(self, most: int, ended: Counter[str], is_full: Callable[[], Overloaded | None]):
        """ended: calls by status, where refusals are counted."""
        self._most = most
        self._is_full = is_full
        self._ended = ended
        self._running = 0

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]],
                                handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method.startswith(ALWAYS_PASS):
            return await continuation(handler_call_details)
        if self._running >= self._most:
            return self._refusing(Overloaded(f"{self._running} calls are running, the limit is {self._most}; try again "
                                             "later or raise max_calls"))
        if method in ASK_FOR_TOKENS and (error := self._is_full()) is not None:
            return self._refusing(error)
        task = asyncio.current_task()
        if task is not None:  # gRPC's, which ends with the call
            self._running += 1
            task.add_done_callback(self._leave)
        return await continuation(handler_call_details)

    def _refusing(self, error: Overloaded) -> grpc.RpcMethodHandler:
        self._ended["RESOURCE_EXHAUSTED"] += 1
        return refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry_hint(error))

    def _leave(self, _: object) -> None:
        self._running -= 1
