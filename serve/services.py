"""`jaxinfer.v1.GenerationService` over a `Core`.

The deadline is the RPC's own and cancelling is the stream's: grpc.aio ends the handler in both cases, and leaving
`Stream`'s context cancels the request in the engine. Errors become status codes by the table in `jaxinfer.errors`.
"""

import asyncio

from jaxinfer.core import Core
from jaxinfer.types import Request
from serve import codec
from serve.calls import Answering, Context
from serve.generation import Generation, open_collected, open_streamed
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc
from serve.served_core import ServedCore, needed, offloaded

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name


class GenerationService(pb_grpc.GenerationServiceServicer):
    """Refuses calls with UNAVAILABLE while `served` does."""

    def __init__(self, served: ServedCore):
        self._served = served

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with Answering(self._served.calls, context, f"{SERVICE_NAME}/Generate", request.request_id) as call:
            core, bridge = self._served.serving()
            asked = await self._read(core, request)
            generation = call.generation = Generation(asked, core.tokenizer)
            async with open_collected(bridge, asked, generation) as stream:
                while await stream.wait():
                    pass
            output, stats = generation.output(), generation.stats()
            return pb.GenerateResponse(
                request_id=asked.id,
                completions=[codec.completion(one, asked.params, generation.has_text) for one in output.outputs],
                usage=codec.usage(stats),
                timings=codec.timings(stats),
                prompt_logprobs=codec.logprobs_messages(output.prompt_logprobs or (), asked.params.prompt_logprobs))

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        async with Answering(self._served.calls, context, f"{SERVICE_NAME}/GenerateStream",
                             request.request_id) as call:
            core, bridge = self._served.serving()
            asked = await self._read(core, request)
            generation = call.generation = Generation(asked, core.tokenizer, streams=True)
            outbox = codec.Outbox(asked.id, asked.params, generation.has_text)
            async with open_streamed(bridge, asked, generation, outbox) as stream:
                while await stream.wait():
                    while outbox.messages:
                        await context.write(outbox.take())

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with Answering(self._served.calls, context):
            core, _ = self._served.serving()
            prompt = codec.prompt(request)
            if not isinstance(prompt, str):
                return pb.TokenizeResponse(token_ids=(await asyncio.to_thread(core.intake.read, prompt)).ids)
            add_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            tokenizer = needed(core.tokenizer)
            tokenizer.check_prompt_bytes(prompt, core.intake.limits.max_tokens)
            return pb.TokenizeResponse(token_ids=await offloaded(len(prompt), tokenizer.encode, prompt, add_special))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with Answering(self._served.calls, context):
            core, _ = self._served.serving()
            tokenizer = needed(core.tokenizer)
            skip_special = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            ids = codec.checked_ids(request.token_ids, core.info.vocab_size, core.intake.limits.max_tokens)
            return pb.DetokenizeResponse(text=await offloaded(len(ids), tokenizer.decode, ids, skip_special))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        async with Answering(self._served.calls, context):
            return codec.model_info(self._served.serving()[0].info)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        async with Answering(self._served.calls, context):
            return codec.load(self._served.serving()[0].engine.load())

    async def _read(self, core: Core, message: pb.GenerateRequest) -> Request:
        return await self._served.request(
            codec.prompt(message), codec.sampling_params(message.sampling, core.intake.defaults.sampling),
            request_id=message.request_id if message.HasField("request_id") else None,
            priority=message.priority, cache_salt=message.cache_salt)
