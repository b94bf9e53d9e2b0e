"""What a finished or running request looks like to users. Names and shapes are vLLM's."""

from dataclasses import dataclass, field

from jaxinfer.types import RequestStats


@dataclass(frozen=True, slots=True)
class Logprob:
    """Raw log-probability (natural, before temperature), rank (1 is the most likely) and text of one token.

    decoded_token is None without a tokenizer; it is that token alone, so half a character shows as U+FFFD.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id to Logprob at one position: the chosen token first, then the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n samples.

    text: everything released so far (all of it once finished). token_ids: generated ids, the stop id or the
    token that completed a stop string included. cumulative_logprob: sum over token_ids, None unless logprobs
    were asked for. finish_reason: None, "stop", "length", "abort" or "error". stop_reason: the stop string
    or stop id that matched; None for end-of-sequence.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and its samples.

    prompt: the text, None when ids were given. prompt_logprobs: one entry a prompt token, the first of them
    None (nothing comes before it). metrics: times and counts, None until the engine has reported them.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStats | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose keys and values came from the prefix cache."""
        return self.metrics.num_cached_tokens if self.metrics else 0


@dataclass(slots=True)
class Delta:
    """What one TokenChunk added to one sample; texts of a sample's deltas concatenate to its final text.

    text may lag behind token_ids: half a character, and text that may be the beginning of a stop string, are
    held back. cancel_row: a stop string ended this sample while its row still runs on the device; the
    receiver must cancel that row (request id and index). error: set with finish_reason "error".
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cancel_row: bool = False
    error: BaseException | None = None
