"""`LLM`: the engine inside this process, for notebooks and batch jobs. Names are vLLM's."""

import asyncio
import dataclasses
import logging
import os
import queue
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jaxinfer import startup
from jaxinfer.assembly import Assembler
from jaxinfer.core import Core
from jaxinfer.errors import EngineClosed, GrammarFailed, InvalidRequest, Overloaded, RowFailed
from jaxinfer.intake import Prompt
from jaxinfer.outputs import Delta, RequestOutput
from jaxinfer.prompt_logits import prompt_logits
from jaxinfer.request_limits import DEFAULT_LIMITS, RequestLimits
from jaxinfer.start_options import Options
from jaxinfer.types import Request, SamplingParams, TokenChunk
from jaxinfer.validation import checked_scored, shown

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.02
"""Pause of a `generate` that finds the queue full of other callers' requests."""

PARAM_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))

Promptlike = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}."""


class LLM:
    """A model, its pages and its compiled programs, ready to generate.

    Args:
      model: a model folder, or "demo" for the shipped one.
      tokenizer: another folder to take the tokenizer from.
      dtype: "auto" (the checkpoint's), "bfloat16" or "float32".
      quantization: "int8" (weights, and the activations of each token) or "int8_weight_only", of the layers'
        projections; None keeps the weights as they are stored.
      kv_cache_dtype: of the pages: "auto" (that of the activations), "bfloat16", "float32", "int8" or "fp8".
      max_model_len: longest prompt + output in tokens; None is the model's own, at most 32,768.
      max_num_seqs: rows that run at once.
      max_num_batched_tokens: token budget of one step.
      page_size: tokens a page of the KV cache; block_size is an alias.
      num_pages: pages in the pool; None takes what memory allows.
      gpu_memory_utilization: share of the accelerator's memory to use for weights, temporaries and pages.
      tensor_parallel_size: devices the model is cut over.
      speculation: what proposes tokens: "ngram" (what followed the last time a request's newest tokens stood in its
        prompt or output), "medusa" (heads on the model's own last hidden state) or "draft_model"; None is the latter
        where there is a draft_model.
      draft_model: a smaller model of the same vocabulary that proposes tokens, or "demo-draft" for the shipped one;
        with "medusa" the folder of the heads, by default the shipped ones of the model "demo". The target's
        distribution stays what it is, and so does, up to rounding, the output of greedy requests and of those with a
        seed. None: see speculation.
      draft_address: "host:port" of a `jaxinfer serve` of a smaller model with the same token ids, on a cheaper chip or
        a CPU, that proposes tokens while this one verifies. Outputs are as with a draft_model, whatever it sends;
        while it is slow or gone, nothing is proposed.
      trust_draft_probs: for sampled requests without a seed, take the probabilities of what that drafter sampled from,
        so that more is kept. Exact only if the drafter is truthful: false probabilities change what is said.
      num_speculative_tokens: most tokens that are proposed in a round.
      enable_prefix_caching: share the pages of equal prompt beginnings.
      seed: the seeds of requests that have none follow from it.
      max_decode_rounds: decode rounds fused into one device call while no request waits.
      max_waiting, max_waiting_tokens: requests that may queue, and prompt tokens of those without a token so far.
      attention: name of the attention implementation; None takes the best that serves the model.
      int8_matmul: name of the int8 matmul's implementation for every size; None takes the best for each.
      compile_cache: folder of the persistent compile cache, or "off". request_limits: what one request may ask for.
      quiet: no progress bars and no start report.

    Raises:
      ModelFormatError, InvalidConfig, OutOfMemory: naming the file or the setting and what to do.
    """

    def __init__(
        self, model: str, *, tokenizer: str | None = None, dtype: str = "auto", quantization: str | None = None,
        kv_cache_dtype: str = "auto", max_model_len: int | None = None, max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048, page_size: int | None = None, block_size: int | None = None,
        num_pages: int | None = None, gpu_memory_utilization: float = 0.9, tensor_parallel_size: int = 1,
        speculation: str | None = None, draft_model: str | None = None, draft_address: str | None = None,
        trust_draft_probs: bool = False, num_speculative_tokens: int = 4, enable_prefix_caching: bool = True,
        seed: int = 0, max_decode_rounds: int = 8, max_waiting: int = 4096, max_waiting_tokens: int = 4_194_304,
        attention: str | None = None, int8_matmul: str | None = None, compile_cache: str | None = None,
        request_limits: RequestLimits = DEFAULT_LIMITS, quiet: bool = False,
    ):
        options = Options(
            model=str(model), tokenizer=_as_path(tokenizer), dtype=dtype, quantization=quantization,
            kv_cache_dtype=kv_cache_dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs, num_pages=num_pages,
            max_num_batched_tokens=max_num_batched_tokens, page_size=_page_size(page_size, block_size), seed=seed,
            gpu_memory_utilization=gpu_memory_utilization, tensor_parallel_size=tensor_parallel_size,
            speculation=speculation, draft_model=_as_path(draft_model), draft_address=draft_address,
            trust_draft_probs=trust_draft_probs, num_speculative_tokens=num_speculative_tokens,
            enable_prefix_caching=enable_prefix_caching, max_decode_rounds=max_decode_rounds, max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens, attention=attention, int8_matmul=int8_matmul,
            compile_cache=_as_path(compile_cache), request_limits=request_limits, show_progress=not quiet)
        started = startup.start(options, say=_silence if quiet else print)
        self.core: Core = started.core
        self.report = started.report
        self._executor = started.executor
        self._max_outstanding = max_waiting
        self._quiet = quiet
        self._closed = False

    def generate(self, prompts: Promptlike | Sequence[Promptlike],
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True,
                 priority: int = 0) -> list[RequestOutput]:
        """Completes one prompt or many; outputs come in the prompts' order.

        sampling_params: one for all, or one a prompt; None takes the model's generation_config. All prompts are
        checked before the first one runs. Raises InvalidRequest, TokenizerMissing or, after `close`, EngineClosed.
        """
        self._check_open()
        given = _as_list(prompts)
        many = _named_each("prompts", sampling_params, [partial(_read, self.core, prompt) for prompt in given])
        requests = _named_each("prompts", sampling_params, [
            partial(self.core.intake.request, prompt, one, priority=priority)
            for prompt, one in zip(many, _one_each(sampling_params, len(many)), strict=True)])
        return self._run(requests, [prompt.text for prompt in many], use_tqdm and not self._quiet)

    def chat(self, messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
             sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True
             ) -> list[RequestOutput]:
        """Answers one conversation or many through the model's chat template. Raises as `generate` does."""
        self._check_open()
        given = _conversations(messages)
        prompts = _named_each("messages", sampling_params, [partial(self.core.intake.chat, one) for one in given])
        requests = _named_each("messages", sampling_params, [
            partial(self.core.intake.request, prompt, one)
            for prompt, one in zip(prompts, _one_each(sampling_params, len(prompts)), strict=True)])
        return self._run(requests, [prompt.text for prompt in prompts], use_tqdm and not self._quiet)

    def stream(self, prompt: Promptlike | Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
               ) -> Generator[Delta, None, None]:
        """Deltas of one prompt (or conversation) as they come; their texts never end in half a character.

        Closing the iterator cancels the request. Raises as `generate` does, before the first delta is asked for.
        """
        return self._stream(*self._request(prompt, sampling_params))

    def _stream(self, request: Request, text: str | None) -> Generator[Delta, None, None]:
        inbox = _Inbox()
        assembler = Assembler(request, self.core.tokenizer, text)
        self.core.engine.submit(request, inbox)
        try:
            while not assembler.finished:
                for chunk in inbox.chunks.get():
                    delta = _feed(self.core, assembler, chunk)
                    if delta is not None:
                        yield delta
        finally:
            if not assembler.finished:
                self.core.engine.cancel(request.id)

    def astream(self, prompt: Promptlike | Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
                ) -> AsyncGenerator[Delta, None]:
        """`stream` for notebooks and servers: an asynchronous iterator. Raises at the call, too."""
        return self._astream(*self._request(prompt, sampling_params))

    async def _astream(self, request: Request, text: str | None) -> AsyncGenerator[Delta, None]:
        inbox = _AsyncInbox(asyncio.get_running_loop())
        assembler = Assembler(request, self.core.tokenizer, text)
        self.core.engine.submit(request, inbox)
        try:
            while not assembler.finished:
                for chunk in await inbox.chunks.get():
                    delta = _feed(self.core, assembler, chunk)
                    if delta is not None:
                        yield delta
        finally:
            if not assembler.finished:
                self.core.engine.cancel(request.id)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32[n, V]: raw logits after each of n tokens, 1 to max_model_len: nothing is generated.

        Raises InvalidRequest for no ids, too many or ids out of range, Overloaded when running requests leave too
        few pages, EngineClosed after `close`.
        """
        self._check_open()
        tokens = checked_scored(token_ids, self.core.intake.limits)
        return self.core.engine.run(lambda engine: prompt_logits(engine, self._executor, tokens))

    def metrics(self) -> dict[str, Any]:
        """Counters and latency histograms since the start, as plain data. Raises EngineClosed after `close`."""
        self._check_open()
        return self.core.engine.metrics()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config asks for, on top of the defaults."""
        return self.core.intake.defaults.sampling

    def close(self) -> None:
        """Stops the engine and frees its memory; running requests end with "abort". May be called twice."""
        self._closed = True
        self.core.engine.close()
        self._executor.free()
        self.core.intake.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("this LLM is closed; make a new one")

    def _request(self, prompt: Any, sampling_params: SamplingParams | None) -> tuple[Request, str | None]:
        """A validated request and the prompt's text, where it has one."""
        self._check_open()
        read = _read(self.core, prompt)
        return self.core.intake.request(read, sampling_params), read.text

    def _run(self, requests: list[Request], texts: list[str | None], show_bar: bool) -> list[RequestOutput]:
        batch = _Batch(self.core, requests, texts)
        try:
            with tqdm(total=len(requests), desc="generating", unit="prompt", disable=not show_bar, delay=0.5) as bar:
                batch.run(self._max_outstanding, bar)
        except BaseException:  # Ctrl-C included: it ends this call and its requests, not the engine
            batch.cancel()
            raise
        return [batch.assemblers[request.id].output() for request in requests]


class _Inbox:
    """Chunks from the engine's thread to a waiting one."""

    def __init__(self):
        self.chunks: queue.SimpleQueue[list[TokenChunk]] = queue.SimpleQueue()

    def deliver(self, chunks: list[TokenChunk]) -> None:
        self.chunks.put(chunks)


class _AsyncInbox:
    """Chunks from the engine's thread to a coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.chunks: asyncio.Queue[list[TokenChunk]] = asyncio.Queue()
        self._loop = loop

    def deliver(self, chunks: list[TokenChunk]) -> None:
        self._loop.call_soon_threadsafe(self.chunks.put_nowait, chunks)


class _Batch:
    """Requests of one `generate` call: submitted as the queue has room, collected until all have ended."""

    def __init__(self, core: Core, requests: list[Request], texts: list[str | None]):
        self._core = core
        self._requests = requests
        self._inbox = _Inbox()
        self.assemblers = {request.id: Assembler(request, core.tokenizer, text)
                           for request, text in zip(requests, texts, strict=True)}
        self._outstanding: set[str] = set()

    def run(self, max_outstanding: int, bar: Any) -> None:
        pending = iter(self._requests)
        samples = 0
        upcoming = next(pending, None)
        while upcoming is not None or self._outstanding:
            while upcoming is not None and (not self._outstanding or samples + upcoming.params.n <= max_outstanding):
                if not self._submit(upcoming):
                    break
                samples += upcoming.params.n
                upcoming = next(pending, None)
            if not self._outstanding:
                time.sleep(RETRY_SECONDS)
                continue
            for ended in self._collect():
                samples -= ended.params.n
                bar.update()

    def _submit(self, request: Request) -> bool:
        """False when other callers have filled the queue: it empties as rows end."""
        try:
            self._core.engine.submit(request, self._inbox)
        except Overloaded:
            return False
        self._outstanding.add(request.id)
        return True

    def _collect(self) -> Iterator[Request]:
        for chunk in self._inbox.chunks.get():
            assembler = self.assemblers[chunk.request_id]
            if isinstance(chunk.error, GrammarFailed | RowFailed):  # this sample's: it ends with finish_reason "error"
                log.warning("%s: %s", chunk.request_id, chunk.error)
                chunk.error = None
            _feed(self._core, assembler, chunk)
            if assembler.finished and chunk.request_id in self._outstanding:
                self._outstanding.discard(chunk.request_id)
                yield assembler.request

    def cancel(self) -> None:
        for request_id in self._outstanding:
            self._core.engine.cancel(request_id)


def _feed(core: Core, assembler: Assembler, chunk: TokenChunk) -> Delta | None:
    """Assembles a chunk; ends the rows whose stop string came; raises what ended the request."""
    delta = assembler.feed(chunk)
    if delta is not None and delta.cancel_row:
        core.engine.cancel(chunk.request_id, chunk.index)
    if chunk.error is not None:
        raise chunk.error
    if chunk.finish_reason == "abort":
        raise EngineClosed("the request was cancelled before it ended")
    return delta


def _as_path(value: Any) -> Any:
    """A pathlib path as a string; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _page_size(page_size: int | None, block_size: int | None) -> int:
    if page_size is not None and block_size is not None and page_size != block_size:
        raise InvalidRequest("block_size", f"{block_size} differs from page_size {page_size}; they are one setting")
    chosen = page_size if page_size is not None else block_size
    return 16 if chosen is None else chosen


def _as_list(prompts: Any) -> list[Any]:
    """Many prompts as a list; one prompt (text, ids or a mapping) as a list of one."""
    if isinstance(prompts, str | bytes | Mapping | np.ndarray):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InvalidRequest("prompts", f"must be text, token ids, a mapping that holds either, or a list of these, "
                             f"got {shown(prompts)}")
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int | np.integer) else prompts


def _conversations(messages: Any) -> list[Any]:
    """Many conversations as a list; one (a list of messages) as a list of one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidRequest("messages", "must be a list of messages, each with role and content, or a list of such "
                             f"lists, got {shown(messages)}")
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def _read(core: Core, prompt: Any) -> Prompt:
    if isinstance(prompt, Mapping):
        known = [key for key in ("prompt_token_ids", "prompt") if key in prompt]
        if len(known) != 1 or len(prompt) != 1:
            raise InvalidRequest("prompt", "a mapping must have one key, prompt or prompt_token_ids; it has "
                                 f"{list(prompt)}")
        prompt = prompt[known[0]]
    return core.intake.read(prompt)


def _one_each(params: Any, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, str | bytes | Mapping) or not isinstance(params, Iterable):
        raise InvalidRequest("sampling_params", "must be SamplingParams, or a list with one for each prompt, got "
                             f"{shown(params)}; make it with SamplingParams(temperature=..., max_tokens=...)")
    params = list(params)
    if len(params) != count:
        raise InvalidRequest("sampling_params", f"{len(params)} given for {count} prompts; give one, or one a prompt")
    return params


def _named_each[T](inputs: str, params: Any, calls: Sequence[Callable[[], T]]) -> list[T]:
    """The calls' results, one an input; of many, an InvalidRequest names the input that it is about."""
    results: list[T] = []
    for index, call in enumerate(calls):
        try:
            results.append(call())
        except InvalidRequest as error:
            if len(calls) == 1:
                raise
            problem = str(error).removeprefix(f"{error.field}: ")
            raise InvalidRequest(_field_of(inputs, index, params, error.field), problem) from None
    return results


def _field_of(inputs: str, index: int, params: Any, field: str) -> str:
    """`field` of input `index`; what all inputs share keeps its name, unless it depends on the prompt's length."""
    if field == "sampling_params":
        return f"sampling_params[{index}]"
    if field in PARAM_FIELDS and not isinstance(params, SamplingParams | None):
        return f"sampling_params[{index}].{field}"
    if field in ("max_tokens", "min_tokens"):
        return f"{inputs}[{index}].{field}"
    if field in PARAM_FIELDS or not field.startswith(("prompt", "messages")):
        return field
    return f"{inputs}[{index}]" + field.removeprefix("prompt").removeprefix("messages")


def _silence(_: str) -> None:
    """Says nothing."""
