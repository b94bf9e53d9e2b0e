"""`jaxinfer.v1.GenerationService` over a `Core`.

The deadline is the RPC's own and cancelling is the stream's: grpc.aio ends the handler in both cases, and leaving
`Stream`'s context cancels the request in the engine. Errors become status codes by the table in `jaxinfer.errors`.
"""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from jaxinfer import errors
from jaxinfer.core import Core
from jaxinfer.errors import EngineClosed, TokenizerMissing
from jaxinfer.intake import Intake
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import Request, TokenChunk
from serve import codec
from serve.bridge import Bridge, Stream
from serve.generation import Generation
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc
from serve.retry_hint import retry_hint

log = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread: beyond this it takes longer than the hop, and the loop serves others."""
GRAMMAR_THREADS = 64
"""Requests that may wait for their grammars at once. In threads of their own: a hostile grammar takes seconds, and
meanwhile other requests need those that tokenise.
"""

Context = grpc.aio.ServicerContext
LEAVING = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


class Calls:
    """Counts the calls that run."""

    def __init__(self):
        self.num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self.num_running += 1
        self._idle.clear()

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
    """

    __slots__ = ("_calls", "_context")

    def __init__(self, calls: Calls, context: Context):
        self._calls = calls
        self._context = context

    async def __aenter__(self) -> None:
        self._calls.enter()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None and not isinstance(error, LEAVING):
                await refuse(self._context, error)
        finally:
            self._calls.leave()


async def refuse(context: Context, error: BaseException) -> None:
    """Ends the call with the error's status; only texts that we wrote ourselves reach the client."""
    if isinstance(error, grpc.aio.BaseError):  # the connection went away under a write: nobody is left to tell
        raise asyncio.CancelledError from error
    code, _, text = errors.status_of(error)
    if code == "INTERNAL":
        log.error("unexpected error in a call", exc_info=error)
    await context.abort(grpc.StatusCode[code], text, retry_hint(error))


class GenerationService(pb_grpc.GenerationServiceServicer):
    """Refuses calls with UNAVAILABLE until `attach` and after `refuse_new`. Lives on one event loop."""

    def __init__(self):
        self.calls = Calls()
        self._core: Core | None = None
        self._bridge: Bridge | None = None
        self._refusal = "the model is still loading; wait until the health service says SERVING"
        self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, "jaxinfer-grammar-wait")

    def attach(self, core: Core) -> None:
        """Begins to serve `core`."""
        self._core = core
        self._bridge = Bridge(core.engine, asyncio.get_running_loop())

    def refuse_new(self, reason: str) -> None:
        """Takes no more calls; those that run go on."""
        self._core = None
        self._refusal = reason

    def fail_running(self, reason: str) -> None:
        """Ends all running requests with UNAVAILABLE."""
        if self._bridge is not None:
            self._bridge.fail_all(EngineClosed(reason))

    def close(self) -> None:
        """Once the engine is closed."""
        self._grammar_threads.shutdown(wait=False, cancel_futures=True)
        if self._bridge is not None:
            self._bridge.close()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with Answering(self.calls, context):
            core, bridge = self._serving()
            asked = await read_request(core.intake, request, self._grammar_threads)
            generation = Generation(asked, core.tokenizer)
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

    async def GenerateStream(self, request: pb.GenerateRequest,
                             context: Context) -> AsyncIterator[pb.GenerateStreamResponse]:
        async with Answering(self.calls, context):
            core, bridge = self._serving()
            asked = await read_request(core.intake, request, self._grammar_threads)
            generation = Generation(asked, core.tokenizer)
            outbox = codec.Outbox(asked.id, asked.params, generation.has_text)
            async with open_streamed(bridge, asked, generation, outbox) as stream:
                while await stream.wait():
                    while outbox.messages:
                        yield outbox.messages.popleft()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with Answering(self.calls, context):
            core, _ = self._serving()
            prompt = codec.prompt(request)
            if not isinstance(prompt, str):
                return pb.TokenizeResponse(token_ids=(await asyncio.to_thread(core.intake.read, prompt)).ids)
            add_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            tokenizer = needed(core.tokenizer)
            return pb.TokenizeResponse(token_ids=await offloaded(len(prompt), tokenizer.encode, prompt, add_special))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with Answering(self.calls, context):
            core, _ = self._serving()
            tokenizer = needed(core.tokenizer)
            skip_special = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            ids = codec.checked_ids(request.token_ids, core.info.vocab_size)
            return pb.DetokenizeResponse(text=await offloaded(len(ids), tokenizer.decode, ids, skip_special))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        async with Answering(self.calls, context):
            return codec.model_info(self._serving()[0].info)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        async with Answering(self.calls, context):
            return codec.load(self._serving()[0].engine.load())

    def _serving(self) -> tuple[Core, Bridge]:
        if self._core is None or self._bridge is None:
            raise EngineClosed(self._refusal)
        return self._core, self._bridge


async def read_request(intake: Intake, message: pb.GenerateRequest, grammar_threads: ThreadPoolExecutor) -> Request:
    """A validated request. Raises InvalidRequest, TokenizerMissing or Overloaded.

    grammar_threads: where a request waits for its grammar to be compiled.
    """
    prompt = codec.prompt(message)
    params = codec.sampling_params(message.sampling, intake.defaults.sampling)
    make = functools.partial(
        intake.request, prompt, params, request_id=message.request_id if message.HasField("request_id") else None,
        priority=message.priority, cache_salt=message.cache_salt)
    if message.sampling.HasField("structured_outputs"):
        return await asyncio.get_running_loop().run_in_executor(grammar_threads, make)
    # Chat templates run in a child process, which takes about a millisecond whatever their size.
    size = INLINE_CHARS + 1 if message.HasField("chat") else len(prompt)
    sampling = message.sampling
    size += len(sampling.allowed_token_ids) + len(sampling.banned_token_ids) + len(sampling.logit_bias)
    return await offloaded(size, make)


async def offloaded[**P, R](size: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`work(...)`, in a thread if the input is large."""
    if size <= INLINE_CHARS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


def open_collected(bridge: Bridge, request: Request, generation: Generation) -> Stream:
    """Runs a request whose answer is read once, at the end: nothing wakes the reader before."""
    def consume(chunk: TokenChunk) -> bool:
        delta = generation.feed(chunk)
        if delta is not None and delta.cancel_row:
            stream.cancel_sample(delta.index)
        return False

    stream = bridge.open(request, consume)
    return stream


def open_streamed(bridge: Bridge, request: Request, generation: Generation, outbox: codec.Outbox) -> Stream:
    """Runs a request whose deltas go to `outbox`."""
    def consume(chunk: TokenChunk) -> bool:
        delta = generation.feed(chunk)
        if chunk.prompt_logprobs is not None:
            outbox.add_prompt_logprobs(generation.prompt_logprobs())
        if delta is not None:
            outbox.add(delta)
            if delta.finish_reason is not None:
                if delta.cancel_row:
                    stream.cancel_sample(delta.index)
                if generation.finished:
                    outbox.close(generation.stats())
        return bool(outbox.messages)

    stream = bridge.open(request, consume)
    return stream


def needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise TokenizerMissing("the model folder has no tokenizer; use token ids")
    return tokenizer
