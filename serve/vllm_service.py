"""`vllm.grpc.engine.VllmEngine` over the same core as `services.GenerationService`, for gateways that speak it.

Tokens in, tokens out: the client tokenises, with the files that GetTokenizer sends. A stream's deltas come sample by
sample; its end is a complete message for each. Abort ends streams by the client's request ids, in any state of theirs.
Stubs: smg-grpc-proto, so this module is imported only where that package is.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from jaxinfer.errors import InvalidRequest
from jaxinfer.tokenizer import Tokenizer
from serve import vllm_codec
from serve.bridge import Bridge, Stream
from serve.calls import Answering, Context
from serve.generation import Generation, open_collected, open_streamed
from serve.served_core import ServedCore, needed
from serve.tenant import current_tenant
from serve.tokenizer_bundle import Bundle, bundle

VLLM_SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
TOKENIZER_CHUNK_BYTES = 64 * 1024
SERVER_TYPE = "jaxinfer"
MAX_ABORTED = 4096
"""Ids of one Abort."""


class Abortable:
    """A call that Abort can end, before its request is in the engine and after."""

    def __init__(self):
        self._stream: Stream | None = None
        self._aborted = False

    def bind(self, stream: Stream) -> None:
        self._stream = stream
        if self._aborted:
            stream.cancel()

    def abort(self) -> None:
        self._aborted = True
        if self._stream is not None:
            self._stream.cancel()


class Abortables:
    """Running calls by tenant and the client's request id. Ids may repeat; an unknown one is ignored, and so is "",
    which is no id: all calls without one would end.
    """

    def __init__(self):
        self._running: dict[tuple[str, str], set[Abortable]] = {}

    def enter(self, request_id: str) -> Abortable:
        call = Abortable()
        self._running.setdefault((current_tenant(), request_id), set()).add(call)
        return call

    def leave(self, request_id: str, call: Abortable) -> None:
        key = current_tenant(), request_id
        calls = self._running[key]
        calls.discard(call)
        if not calls:
            del self._running[key]

    def abort(self, request_id: str) -> None:
        for call in self._running.get((current_tenant(), request_id), ()) if request_id else ():
            call.abort()


class VllmService(pb_grpc.VllmEngineServicer):
    """Refuses calls with UNAVAILABLE while `served` does. What we do not offer is UNIMPLEMENTED."""

    def __init__(self, served: ServedCore):
        self._served = served
        self._abortables = Abortables()
        self._began = time.monotonic()
        self._last_receive = 0.0
        self._bundle: Bundle | None = None
        self._bundling = asyncio.Lock()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        self._last_receive = time.time()
        call = self._abortables.enter(request.request_id)
        try:
            async with Answering(self._served.calls, context, f"{VLLM_SERVICE_NAME}/Generate",
                                 request.request_id) as answering:
                core, bridge = self._served.serving()
                params = vllm_codec.sampling_params(request.sampling_params)
                asked = await self._served.request(vllm_codec.prompt(request), params,
                                                   request_id=request.request_id or None)
                generation = answering.generation = Generation(asked, core.tokenizer, streams=request.stream)
                if not request.stream:
                    for message in await self._collect(bridge, generation, call):
                        await context.write(message)
                    return
                outbox = vllm_codec.Outbox(generation)
                async with open_streamed(bridge, asked, generation, outbox) as stream:
                    call.bind(stream)
                    while await stream.wait():
                        while outbox.messages:
                            await context.write(outbox.take())
                outbox.abort()
                while outbox.messages:
                    await context.write(outbox.take())
        finally:
            self._abortables.leave(request.request_id, call)

    async def _collect(self, bridge: Bridge, generation: Generation, call: Abortable) -> list[pb.GenerateResponse]:
        async with open_collected(bridge, generation.request, generation) as stream:
            call.bind(stream)
            while await stream.wait():
                pass
        return list(vllm_codec.completes(generation))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Passes every limit (`call_limit.ALWAYS_PASS`), so its own work is bounded here."""
        async with Answering(self._served.calls, context):
            if len(request.request_ids) > MAX_ABORTED:
                raise InvalidRequest("request_ids", f"has {len(request.request_ids)} ids, the limit is {MAX_ABORTED}; "
                                     "send the others in another call")
            for request_id in request.request_ids:
                self._abortables.abort(request_id)
            return pb.AbortResponse()

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        async with Answering(self._served.calls, context):
            alive = self._served.serving()[0].engine.alive
            return pb.HealthCheckResponse(healthy=alive, message="" if alive else "the engine has died")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        async with Answering(self._served.calls, context):
            return vllm_codec.model_info(self._served.serving()[0])

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        async with Answering(self._served.calls, context):
            core, bridge = self._served.serving()
            return pb.GetServerInfoResponse(
                active_requests=bridge.num_streams, last_receive_timestamp=self._last_receive,
                uptime_seconds=time.monotonic() - self._began, server_type=SERVER_TYPE, data_parallel_size=1,
                model_dtype=core.info.dtype)

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        async with Answering(self._served.calls, context):
            return vllm_codec.loads(self._served.serving()[0].engine.load())

    async def _not_offered(self, request: Any, context: Any) -> Any:
        """The generated default would answer the same, and log a traceback for each call."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not offer it")

    Embed = FlushCache = StartProfile = StopProfile = SubscribeKvEvents = _not_offered

    async def GetTokenizer(self, request: common_pb2.GetTokenizerRequest, context: Context
                           ) -> AsyncIterator[common_pb2.GetTokenizerChunk]:  # fmt: skip
        async with Answering(self._served.calls, context):
            archive, sha256 = await self._tokenizer_files(needed(self._served.serving()[0].tokenizer))
            for start in range(0, len(archive), TOKENIZER_CHUNK_BYTES):
                end = start + TOKENIZER_CHUNK_BYTES
                yield common_pb2.GetTokenizerChunk(
                    data=archive[start:end], sha256=sha256 if end >= len(archive) else "")

    async def _tokenizer_files(self, tokenizer: Tokenizer) -> Bundle:
        """Made once: it takes a second of a thread, and a copy for each call would be memory without a bound."""
        async with self._bundling:
            if self._bundle is None:
                self._bundle = await asyncio.to_thread(bundle, tokenizer)
            return self._bundle


def register(served: ServedCore, server: grpc.aio.Server) -> str:
    """Adds the service to `server`; returns its name."""
    pb_grpc.add_VllmEngineServicer_to_server(VllmService(served), server)
    return VLLM_SERVICE_NAME
