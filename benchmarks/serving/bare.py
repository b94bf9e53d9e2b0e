"""The least that a grpc.aio server can do: it sends each request the messages recorded for it, one a beat."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from benchmarks.serving.counting import PACE_SECONDS, ReadyTimes
from benchmarks.serving.wire import SERVICES, Service


class BareServer:
    """Both services, without interceptors, checks or an engine. Lives on one event loop."""

    def __init__(self):
        self.ready: ReadyTimes = {}
        self._messages: dict[str, list[Any]] = {}
        self._waiting: list[asyncio.Future[float]] = []
        self._beating = False
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers(tuple(map(self._handler, SERVICES.values())))

    async def start(self) -> int:
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    def load(self, service: str, bodies: dict[str, list[bytes]]) -> None:
        """What it is to send: request id to messages of `service`. gRPC serialises them again, as for ours."""
        parse = SERVICES[service].response.FromString
        self._messages = {id: [parse(raw) for raw in raws] for id, raws in bodies.items()}

    def _handler(self, service: Service) -> grpc.GenericRpcHandler:
        _, name, method = service.method.split("/")
        return grpc.method_handlers_generic_handler(name, {method: grpc.unary_stream_rpc_method_handler(
            self._stream, service.request.FromString, service.response.SerializeToString)})

    async def _stream(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        ready = self.ready[request.request_id] = []
        for message in self._messages[request.request_id]:
            ready.append(await self._beat())
            yield message

    def _beat(self) -> "asyncio.Future[float]":
        loop = asyncio.get_running_loop()
        if not self._beating:
            self._beating = True
            loop.call_later(PACE_SECONDS, self._strike, loop, loop.time() + PACE_SECONDS)
        future = loop.create_future()
        self._waiting.append(future)
        return future

    def _strike(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        waiting, self._waiting = self._waiting, []
        self._beating = bool(waiting)
        if waiting:
            due = max(due + PACE_SECONDS, loop.time())
            loop.call_at(due, self._strike, loop, due)
        now = time.monotonic()
        for future in waiting:
            if not future.done():
                future.set_result(now)
