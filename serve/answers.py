"""What the client hands to users: plain, frozen values made from the wire's messages. No jax, no engine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from jaxinfer.core import Load, ModelInfo
from serve.protos.jaxinfer.v1 import generation_pb2 as pb

FINISH_REASONS: dict[int, str | None] = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One likely token: raw log-probability, rank (1 is the most likely), text (None without a tokenizer)."""

    token_id: int
    logprob: float
    rank: int
    text: str | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The token that was chosen, and the most likely ones."""

    token_id: int
    logprob: float
    rank: int
    text: str | None
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. output_tokens: of all samples. cached_tokens: of the prompt, from the prefix cache; None if unknown."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, measured by the server.

    queue: from arrival until first scheduled, None if unknown. ttft: from arrival to the first token. decode: from
    there to the last. total: from arrival to the end.
    """

    queue: float | None
    ttft: float
    decode: float
    total: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One of the n samples.

    finish_reason: "stop", "length" or "abort"; None while it runs. stop_reason: the stop string or stop id that
    matched; None for end-of-sequence. logprobs: one entry a token, () unless asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def read(cls, message: pb.Completion) -> Self:
        reason = message.WhichOneof("stop_reason")
        return cls(message.index, message.text, tuple(message.token_ids), FINISH_REASONS.get(message.finish_reason),
                   getattr(message, reason) if reason else None, token_logprobs(message.logprobs))


@dataclass(frozen=True, slots=True)
class Delta(Sample):
    """What is new of one sample. Texts and token ids of a sample's deltas concatenate to the whole."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. text, token_ids and so on are those of the first sample."""

    request_id: str
    samples: tuple[Sample, ...]
    usage: Usage
    timings: Timings
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the second prompt token on; () unless asked for."""

    @classmethod
    def read(cls, message: pb.GenerateResponse) -> Self:
        return cls(message.request_id, tuple(map(Sample.read, message.completions)), usage(message.usage),
                   timings(message.timings), token_logprobs(message.prompt_logprobs))

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.samples[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.samples[0].stop_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.samples[0].logprobs


def token_logprobs(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(one.token_id, one.logprob, one.rank, _text(one),
                              tuple(TopLogprob(top.token_id, top.logprob, top.rank, _text(top)) for top in one.top))
                 for one in messages)


def usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.output_tokens,
                 message.cached_tokens if message.HasField("cached_tokens") else None)


def timings(message: pb.Timings) -> Timings:
    return Timings(message.queue if message.HasField("queue") else None, message.ttft, message.decode, message.total,
                   message.preemptions)


def model_info(message: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        message.name, message.family, message.vocab_size, message.max_model_len, message.dtype, message.num_parameters,
        tuple(message.eos_token_ids), message.has_tokenizer, message.has_chat_template)


def load(message: pb.GetLoadResponse) -> Load:
    return Load(message.num_running, message.num_waiting, message.num_waiting_tokens, message.pages_used,
                message.pages_cached, message.pages_total)


def _text(message: pb.TokenLogprob | pb.TopLogprob) -> str | None:
    return message.text if message.HasField("text") else None
