"""Protobuf messages to the core's types and back; the only place that knows both."""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

from jaxinfer.chat_template import MAX_MESSAGES
from jaxinfer.core import Load, ModelInfo
from jaxinfer.errors import InvalidRequest
from jaxinfer.outputs import CompletionOutput, Delta, Logprob, PositionLogprobs
from jaxinfer.types import RequestStats, SamplingParams, StructuredOutput
from serve.model_name import model_name
from serve.protos.jaxinfer.v1 import generation_pb2 as pb

MAX_TOKENS_PER_MESSAGE = 1024
"""A message takes no more tokens once it has this many; with 20 log-probabilities each it stays under gRPC's 4 MiB."""
LOGPROB_WEIGHT = 4
"""Tokens that a log-probability counts for there: a message that may still grow is kept as objects, of which one for a
log-probability takes some 85 bytes.
"""

FINISH_REASONS: Mapping[str, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}

SCALARS = (bool, int, float, str)
MOST_ENTRIES = 2**20
"""Of a list of a request. It bounds what is copied on the event loop; what may be in a list is the validator's to say,
and is less.
"""

PromptMessage = pb.GenerateRequest | pb.TokenizeRequest


# ---- requests


def prompt(message: PromptMessage) -> str | list[int] | list[dict[str, str]]:
    """The prompt in one of the forms that `Intake` reads. Raises InvalidRequest."""
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return message.text
    if kind == "chat":
        return chat_messages(message.chat)
    if kind == "token_ids" and isinstance(message, pb.GenerateRequest):
        return list(message.token_ids.ids)
    choices = " or ".join(one.name for one in message.DESCRIPTOR.oneofs_by_name["prompt"].fields)
    raise InvalidRequest("prompt", f"is missing; set {choices}")


def chat_messages(chat: pb.ChatPrompt) -> list[dict[str, str]]:
    """Messages as templates know them. Raises InvalidRequest."""
    if not chat.messages:
        raise InvalidRequest("chat.messages", "is empty; give at least one message")
    if len(chat.messages) > MAX_MESSAGES:
        raise InvalidRequest("chat.messages", f"has {len(chat.messages)} messages; the limit is {MAX_MESSAGES}")
    for position, message in enumerate(chat.messages):
        for name in ("role", "content"):
            if not message.HasField(name):
                raise InvalidRequest(f"chat.messages[{position}].{name}", "is missing")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def sampling_params(message: pb.SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """The fields that were set, over `defaults`: both sides have the same names, which a test holds."""
    return replace(defaults, **{one.name: plain(few(one.name, value)) for one, value in message.ListFields()})


def few[T](field: str, value: T) -> T:
    """A field that is no list, or one that is not too long to be copied. Raises InvalidRequest."""
    if isinstance(value, Sized) and not isinstance(value, str) and len(value) > MOST_ENTRIES:
        raise InvalidRequest(field, f"has {len(value)} entries; the limit is {MOST_ENTRIES}")
    return value


def plain(value: Any) -> Any:
    """A field's value without protobuf's containers."""
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, pb.StructuredOutput):
        return StructuredOutput(**{one.name: plain(sent) for one, sent in value.ListFields()})
    if isinstance(value, pb.Choices):
        return tuple(value.texts)
    return dict(value) if isinstance(value, Mapping) else tuple(value)


def checked_ids(ids: Sequence[int], vocab_size: int, most: int) -> list[int]:
    """At most so many ids to be turned into text. Raises InvalidRequest."""
    if len(ids) > most:
        raise InvalidRequest("token_ids", f"has {len(ids)} tokens; the limit is {most}, the longest request that can "
                             "run; send them in pieces")
    for bad in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= bad < vocab_size:
            raise InvalidRequest("token_ids", f"token id {bad} is not in the vocabulary, [0, {vocab_size})")
    return list(ids)


# ---- responses


def weight_of_token(params: SamplingParams) -> int:
    """For how many tokens without log-probabilities one of this request counts in a message."""
    return 1 if params.logprobs is None else 1 + LOGPROB_WEIGHT * (1 + params.logprobs)


class Outbox:
    """Deltas that wait to be sent, as messages: what comes while the reader is busy joins the message that waits.

    Messages that grow no more wait as bytes, which take a quarter of the memory where there are log-probabilities.
    """

    def __init__(self, request_id: str, params: SamplingParams, has_text: bool):
        self.messages: deque[pb.GenerateStreamResponse | bytes] = deque()
        """Oldest first; `take` one to send it, and then it grows no more. The last one may grow, and is no bytes."""
        self._request_id: str | None = request_id
        self._params = params
        self._has_text = has_text
        self._weight = weight_of_token(params)
        self._room = 0
        self._newest = pb.GenerateStreamResponse()  # the last of the messages, while there are any
        self._texts: defaultdict[int, list[str]] = defaultdict(list)  # what its entries' texts will get
        self._refillable: tuple[pb.GenerateStreamResponse, pb.Completion] | None = None

    def add(self, delta: Delta) -> None:
        """It runs for every token, so what is not there costs nothing."""
        if not self.messages and self._refillable is not None:
            message, entry = self._refillable
            self._refill(message, entry, delta)
        elif not self.messages or self._room <= 0:
            entry = self._begin(delta)
        else:
            entry = entry_of(self._newest, delta.index)
            entry.token_ids.extend(delta.token_ids)
            if self._has_text:
                self._texts[delta.index].append(delta.text)
        self._room -= self._weight * len(delta.token_ids)
        if delta.logprobs is not None:
            entry.logprobs.extend(logprobs_messages(delta.logprobs, self._params.logprobs))
        if delta.finish_reason is not None:
            set_finish(entry, delta.finish_reason, delta.stop_reason)

    def add_prompt_logprobs(self, found: Sequence[PositionLogprobs | None]) -> None:
        """In pieces: those of a long prompt would not fit into one message."""
        for start in range(0, len(found), MAX_TOKENS_PER_MESSAGE):
            piece = found[start:start + MAX_TOKENS_PER_MESSAGE]
            self._append(pb.GenerateStreamResponse(
                prompt_logprobs=logprobs_messages(piece, self._params.prompt_logprobs)))
        self._room = 0

    def close(self, stats: RequestStats) -> None:
        """Puts usage and timings on the last message, which the last delta has just made or joined."""
        self._newest.usage.CopyFrom(usage(stats))
        self._newest.timings.CopyFrom(timings(stats))

    def take(self) -> pb.GenerateStreamResponse:
        """The oldest message, to be sent."""
        message = self.messages.popleft()
        if isinstance(message, bytes):
            return pb.GenerateStreamResponse.FromString(message)
        if self._texts:
            self._join_texts()
        return message

    def _append(self, message: pb.GenerateStreamResponse) -> None:
        """Behind the last one, which then grows no more."""
        if self.messages:
            self._join_texts()
            self.messages[-1] = self._newest.SerializeToString()
        self._newest = message
        self.messages.append(message)

    def _join_texts(self) -> None:
        """Once for each message: what a string field held before stays in the message's memory until it goes."""
        for index, texts in self._texts.items():
            entry_of(self._newest, index).text += "".join(texts)
        self._texts.clear()

    def _begin(self, delta: Delta) -> pb.Completion:
        message = pb.GenerateStreamResponse()
        entry = message.deltas.add(index=delta.index, token_ids=delta.token_ids,
                                   text=delta.text if self._has_text else None)
        if self._request_id is not None:
            message.request_id, self._request_id = self._request_id, None
        elif self._params.n == 1 and self._params.logprobs is None:
            self._refillable = message, entry
        self._append(message)
        self._room = MAX_TOKENS_PER_MESSAGE
        return entry

    def _refill(self, message: pb.GenerateStreamResponse, entry: pb.Completion, delta: Delta) -> None:
        """Sends a message once more, with new text and ids, in half the time of a new one. It was serialised before it
        was sent, so nobody reads it any more; what else a message may hold comes only with a stream's last."""
        entry.token_ids[:] = delta.token_ids
        if self._has_text:
            entry.text = delta.text
        self._append(message)
        self._room = MAX_TOKENS_PER_MESSAGE


def entry_of(message: pb.GenerateStreamResponse, index: int) -> pb.Completion:
    """The delta of sample `index`, made if it is not there."""
    return next((entry for entry in message.deltas if entry.index == index), None) or message.deltas.add(index=index)


def completion(output: CompletionOutput, params: SamplingParams, has_text: bool) -> pb.Completion:
    """One whole sample."""
    message = pb.Completion(index=output.index, text=output.text if has_text else None, token_ids=output.token_ids)
    if output.logprobs is not None:
        message.logprobs.extend(logprobs_messages(output.logprobs, params.logprobs))
    if output.finish_reason is not None:
        set_finish(message, output.finish_reason, output.stop_reason)
    return message


def set_finish(message: pb.Completion, finish_reason: str, stop_reason: int | str | None) -> None:
    message.finish_reason = FINISH_REASONS[finish_reason]
    if isinstance(stop_reason, str):
        message.stop_string = stop_reason
    elif stop_reason is not None:
        message.stop_token_id = stop_reason


def logprobs_messages(positions: Iterable[PositionLogprobs | None], limit: int | None) -> list[pb.TokenLogprob]:
    """The chosen token of each position, and its `limit` most likely ones; positions without any are left out."""
    return [_position(entries, limit or 0) for entries in positions if entries]


def _position(entries: PositionLogprobs, limit: int) -> pb.TokenLogprob:
    (token_id, chosen), *_ = entries.items()  # the chosen token comes first
    message = pb.TokenLogprob(token_id=token_id, logprob=chosen.logprob, rank=chosen.rank, text=chosen.decoded_token)
    for id, entry in likeliest(entries, limit):
        message.top.add(token_id=id, logprob=entry.logprob, rank=entry.rank, text=entry.decoded_token)
    return message


def likeliest(entries: PositionLogprobs, limit: int) -> list[tuple[int, Logprob]]:
    """The `limit` most likely tokens of a position, in that order; the chosen one only if it is one of them."""
    ranked = sorted((entry.rank, id) for id, entry in entries.items() if entry.rank is not None and entry.rank <= limit)
    return [(id, entries[id]) for _, id in ranked]


def usage(stats: RequestStats) -> pb.Usage:
    """`scheduled` is 0 where the engine has not reported; then cached tokens are unknown, which is not none."""
    return pb.Usage(prompt_tokens=stats.num_prompt_tokens, output_tokens=stats.num_output_tokens,
                    cached_tokens=stats.num_cached_tokens if stats.scheduled else None)


def timings(stats: RequestStats) -> pb.Timings:
    return pb.Timings(
        queue=stats.scheduled - stats.arrival if stats.scheduled else None, ttft=stats.first_token - stats.arrival,
        decode=stats.finished - stats.first_token, total=stats.finished - stats.arrival,
        preemptions=stats.num_preemptions)


def model_info(info: ModelInfo) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        name=model_name(info.name), family=info.family, vocab_size=info.vocab_size, max_model_len=info.max_model_len,
        dtype=info.dtype, num_parameters=info.num_parameters, eos_token_ids=info.eos_token_ids,
        has_tokenizer=info.has_tokenizer, has_chat_template=info.has_chat_template)


def load(load: Load) -> pb.GetLoadResponse:
    return pb.GetLoadResponse(
        num_running=load.num_running, num_waiting=load.num_waiting, num_waiting_tokens=load.num_waiting_tokens,
        pages_used=load.pages_used, pages_cached=load.pages_cached, pages_total=load.pages_total)
