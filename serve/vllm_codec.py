"""Messages of `vllm.grpc.engine` to the core's types and back. Imports smg-grpc-proto, which has the stubs.

Zero is unset in fields without presence: vLLM's default, which is what clients of
this protocol expect. What the model itself wishes for stands in `default_sampling_params_json`, which gateways apply.
"""

import datetime
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

import jaxinfer
from jaxinfer.core import Core, Load
from jaxinfer.errors import InvalidRequest
from jaxinfer.outputs import CompletionOutput, Delta, PositionLogprobs
from jaxinfer.types import RequestStats, SamplingParams, StructuredOutput
from serve.codec import MAX_TOKENS_PER_MESSAGE, few, likeliest, weight_of_token
from serve.generation import Generation
from serve.model_name import model_name

SAME_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "max_tokens", "min_tokens", "ignore_eos", "n", "logprobs", "prompt_logprobs", "seed", "include_stop_str_in_output",
)  # fmt: skip
"""Scalars whose names and meanings are ours."""
KINDS: Mapping[str, str] = {"json_schema": "json", "regex": "regex", "grammar": "grammar",
                            "json_object": "json_object", "choice": "choice"}
"""Constraints, and their fields of StructuredOutput."""
NOT_TAKEN: Mapping[str, str] = {
    "kv_transfer_params": "this server computes prefill and decode itself",
    "kv_transfer_params_json": "this server computes prefill and decode itself",
    "mm_inputs": "the model takes text only",
    "extra_mm_inputs": "the model takes text only",
    "media_refs": "the model takes text only",
}
"""Fields of a request that would change its answer, and why they cannot."""
MODELS_WISHES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What gateways take from `default_sampling_params_json`."""
ABORT = "abort"


# ---- requests


def prompt(message: pb.GenerateRequest) -> str | list[int]:
    """The prompt as `Intake` reads it. Raises InvalidRequest, also for fields that ask for what we cannot do."""
    for field, _ in message.ListFields():
        if field.name in NOT_TAKEN:
            raise InvalidRequest(field.name, f"is set, but {NOT_TAKEN[field.name]}; leave it out")
    if message.data_parallel_rank:
        raise InvalidRequest("data_parallel_rank", f"is {message.data_parallel_rank}, but there is only rank 0")
    kind = message.WhichOneof("input")
    if kind == "tokenized":
        return list(message.tokenized.input_ids)
    if kind == "text":
        return message.text
    raise InvalidRequest("input", "is missing; set tokenized or text")


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """The fields that are not zero, over vLLM's defaults. Without max_tokens an output may be as long as fits.

    A zero counts where the field has presence: max_tokens, logprobs, prompt_logprobs, seed, temperature. What the model
    itself wishes for is the gateway's to fill in (`models_wishes`), so an unset field never means that here.
    """
    if message.HasField("truncate_prompt_tokens"):
        raise InvalidRequest("truncate_prompt_tokens", "is set, but prompts are never cut; send the tokens that count")
    sent = {one.name: value for one, value in message.ListFields() if one.name in SAME_NAMES}
    return replace(
        SamplingParams(max_tokens=None), **sent, stop=tuple(few("stop", message.stop)) or None,
        stop_token_ids=tuple(few("stop_token_ids", message.stop_token_ids)) or None,
        logit_bias=dict(few("logit_bias", message.logit_bias)) or None,
        structured_outputs=structured_output(message),
        # Only tokens go out, so text is made where a stop string has to be found in it.
        detokenize=bool(message.stop), skip_special_tokens=message.skip_special_tokens)


def structured_output(message: pb.SamplingParams) -> StructuredOutput | None:
    kind = message.WhichOneof("constraint")
    if kind is None:
        return None
    if kind not in KINDS:
        raise InvalidRequest(kind, f"is not taken; use one of {', '.join(KINDS)}")
    value: Any = tuple(message.choice.choices) if kind == "choice" else getattr(message, kind)
    return StructuredOutput(**{KINDS[kind]: value}) if value is not False else None


# ---- responses


Growing = tuple[pb.GenerateResponse, pb.GenerateStreamChunk]
"""A message and the chunk in it, which it would take as long to find as to fill."""


class Outbox:
    """What waits to be sent, as chunks of one sample each: new tokens join the sample's chunk that waits.

    Messages that grow no more wait as bytes, as in `codec.Outbox`.
    """

    def __init__(self, generation: Generation):
        self.messages: deque[pb.GenerateResponse | bytes] = deque()
        """Oldest first; `take` one to send it, and then it grows no more."""
        self._generation = generation
        self._limit = generation.request.params.logprobs
        self._most_tokens = MAX_TOKENS_PER_MESSAGE // weight_of_token(generation.request.params)
        self._waiting: dict[int, Growing] = {}  # of each sample
        self._said = dict.fromkeys(range(generation.request.params.n), 0)
        self._running = set(self._said)
        self._input_logprobs: pb.InputLogProbs | None = None
        self._refillable: Growing | None = None

    def add(self, delta: Delta) -> None:
        """It runs for every token, so what is not there costs nothing."""
        if delta.token_ids:
            if self._refillable is not None and not self.messages and self._input_logprobs is None:
                chunk = self._refill(self._refillable, delta)
            else:
                chunk = self._chunk(delta.index)
                chunk.token_ids.extend(delta.token_ids)
                chunk.completion_tokens += len(delta.token_ids)
            if delta.logprobs is not None:
                fill_output_logprobs(chunk.output_logprobs, delta.token_ids, delta.logprobs, self._limit or 0)
            self._said[delta.index] += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._complete(delta.index, delta.finish_reason, delta.stop_reason)

    def add_prompt_logprobs(self, found: Sequence[PositionLogprobs | None]) -> None:
        """They go with the request's next chunk."""
        self._input_logprobs = input_logprobs(self._generation, found)

    def close(self, stats: RequestStats) -> None:
        """Nothing to add: each sample's end has its counts."""

    def take(self) -> pb.GenerateResponse:
        message = self.messages.popleft()
        if isinstance(message, bytes):
            return pb.GenerateResponse.FromString(message)
        for index, (waiting, _) in self._waiting.items():
            if waiting is message:
                del self._waiting[index]
                break
        return message

    def abort(self) -> None:
        """Ends the samples that have not ended."""
        for index in sorted(self._running):
            self._complete(index, ABORT, None)

    def _chunk(self, index: int) -> pb.GenerateStreamChunk:
        """The sample's chunk that waits, or one more."""
        waiting = self._waiting.get(index)
        if waiting is not None:
            message, chunk = waiting
            if len(chunk.token_ids) < self._most_tokens and self._input_logprobs is None:
                return chunk
            self._pack(message)
        message, chunk = self._waiting[index] = self._begin(index)
        self.messages.append(message)
        return chunk

    def _pack(self, message: pb.GenerateResponse) -> None:
        """It is one of the newest: each sample has at most one that grows."""
        for position in reversed(range(len(self.messages))):
            if self.messages[position] is message:
                self.messages[position] = message.SerializeToString()
                return

    def _refill(self, growing: Growing, delta: Delta) -> pb.GenerateStreamChunk:
        """Sends a message once more, with new ids, in half the time of a new one. It was serialised before it was sent,
        so nobody reads it any more."""
        message, chunk = self._waiting[delta.index] = growing
        chunk.token_ids[:] = delta.token_ids
        chunk.completion_tokens = len(delta.token_ids)
        self.messages.append(message)
        return chunk

    def _begin(self, index: int) -> Growing:
        message = pb.GenerateResponse(chunk=pb.GenerateStreamChunk(
            index=index, prompt_tokens=len(self._generation.request.prompt),
            cached_tokens=self._generation.num_cached_tokens, input_logprobs=self._input_logprobs))
        growing = message, message.chunk
        # A stream's first message may wait for its headers, unserialised, while more comes.
        if self._said[index] and self._limit is None and len(self._said) == 1 and self._input_logprobs is None:
            self._refillable = growing
        self._input_logprobs = None
        return growing

    def _complete(self, index: int, finish_reason: str, stop_reason: int | str | None) -> None:
        self._running.discard(index)
        self.messages.append(pb.GenerateResponse(complete=pb.GenerateComplete(
            index=index, finish_reason=finish_reason, completion_tokens=self._said[index],
            prompt_tokens=len(self._generation.request.prompt), cached_tokens=self._generation.num_cached_tokens,
            **matched(stop_reason))))


def completes(generation: Generation) -> Iterator[pb.GenerateResponse]:
    """The whole samples of a request that was not streamed; "abort" for those that were ended from outside."""
    scored = generation.request.params.prompt_logprobs is not None
    of_prompt = input_logprobs(generation, generation.prompt_logprobs()) if scored else None
    for sample in generation.output().outputs:
        yield pb.GenerateResponse(complete=complete(generation, sample, of_prompt))


def complete(generation: Generation, sample: CompletionOutput, of_prompt: pb.InputLogProbs | None
             ) -> pb.GenerateComplete:  # fmt: skip
    params = generation.request.params
    message = pb.GenerateComplete(
        index=sample.index, output_ids=sample.token_ids, finish_reason=sample.finish_reason or ABORT,
        prompt_tokens=len(generation.request.prompt), completion_tokens=len(sample.token_ids),
        cached_tokens=generation.num_cached_tokens, input_logprobs=of_prompt, **matched(sample.stop_reason))
    if sample.logprobs is not None:
        fill_output_logprobs(message.output_logprobs, sample.token_ids, sample.logprobs, params.logprobs or 0)
    return message


def matched(stop_reason: int | str | None) -> dict[str, Any]:
    """The field of a complete message for what ended it; none for end-of-sequence and the length."""
    if stop_reason is None:
        return {}
    return {"matched_stop_str" if isinstance(stop_reason, str) else "matched_token_id": stop_reason}


def fill_output_logprobs(message: pb.OutputLogProbs, token_ids: Iterable[int], positions: Iterable[PositionLogprobs],
                         limit: int) -> None:
    """Adds the log-probability of each token; with `limit` the so many most likely ones of its position."""
    for id, entries in zip(token_ids, positions, strict=True):
        message.token_ids.append(id)
        message.token_logprobs.append(entries[id].logprob)
        if limit:
            message.top_logprobs.append(top_logprobs(entries, limit))


def input_logprobs(generation: Generation, positions: Sequence[PositionLogprobs | None]) -> pb.InputLogProbs:
    """One entry a prompt token; the first has no value."""
    prompt, limit = generation.request.prompt, generation.request.params.prompt_logprobs or 0
    message = pb.InputLogProbs(token_ids=prompt[:len(positions)])
    for id, entries in zip(prompt, positions, strict=False):
        message.token_logprobs.add(value=entries[id].logprob if entries else None)
        if limit:
            message.top_logprobs.append(top_logprobs(entries or {}, limit))
    return message


def top_logprobs(entries: PositionLogprobs, limit: int) -> pb.TopLogProbs:
    found = likeliest(entries, limit)
    return pb.TopLogProbs(token_ids=[id for id, _ in found], values=[entry.logprob for _, entry in found])


def model_info(core: Core) -> pb.GetModelInfoResponse:
    """Paths are not the clients' business: tokenizer_path stays empty, and GetTokenizer has the files."""
    info, name = core.info, model_name(core.info.name)
    return pb.GetModelInfoResponse(
        model_path=name, served_model_name=name, is_generation=True, max_context_length=info.max_model_len,
        vocab_size=info.vocab_size, model_type=info.family, eos_token_ids=info.eos_token_ids,
        bos_token_id=(core.tokenizer.bos_id if core.tokenizer else None) or 0,
        max_req_input_len=info.max_model_len - 1,
        default_sampling_params_json=models_wishes(core.intake.defaults.sampling))


def models_wishes(defaults: SamplingParams) -> str:
    """What differs from vLLM's defaults, as JSON; "" for nothing."""
    wished, plain = (asdict(one) for one in (defaults, SamplingParams()))
    wishes = {name: wished[name] for name in MODELS_WISHES if wished[name] != plain[name]}
    return json.dumps(wishes) if wishes else ""


def loads(load: Load) -> pb.GetLoadsResponse:
    usage = load.pages_used / max(load.pages_total, 1)
    return pb.GetLoadsResponse(
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(), version=jaxinfer.__version__, dp_rank_count=1,
        loads=[pb.SchedulerLoad(
            num_running_reqs=load.num_running, num_waiting_reqs=load.num_waiting,
            num_total_reqs=load.num_running + load.num_waiting, num_waiting_uncached_tokens=load.num_waiting_tokens,
            token_usage=usage, utilization=usage)])
