"""Plain data that crosses module borders: requests, plans, results. No jax here.

Letters as in README.md: R rows of a step, V vocabulary, C tokens a page.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_STOP_IDS = 16
"""Stop ids a row can hold on the device (end-of-sequence ids included)."""

MAX_LOGPROBS = 20
"""Most log-probabilities a token; the OpenAI API has the same limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Names and defaults are vLLM's.

    temperature: 0 is greedy. top_k: 0 or -1 is off. top_p in (0, 1], min_p in [0, 1]: shares of probability.
    seed: any int64; None draws one. logprobs / prompt_logprobs: how many alternatives a token
    (raw, before temperature), None for none. stop: strings that end the output and are cut from it
    unless include_stop_str_in_output. max_tokens None means up to the model's length.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A validated request as the scheduler sees it: nothing optional is left open.

    stop_ids: every id that ends a row (stop_token_ids, and end-of-sequence unless ignored), at most
    MAX_STOP_IDS. priority: lower runs first. arrival: time.monotonic() seconds.
    cache_salt: requests share prefix pages only with requests of the same salt.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...] = ()
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""


class SamplerForm(enum.IntEnum):
    """The compiled samplers, smallest first; a step runs the smallest that covers its rows."""

    GREEDY = 0
    """argmax"""
    SIMPLE = 1
    """temperature, top-k, top-p, min-p with seeded noise"""
    FULL = 2
    """SIMPLE with a minimum length and log-probabilities"""


class StepKind(enum.Enum):
    PREFILL = "prefill"
    """any ragged mix of prompt chunks and single decode tokens"""
    DECODE = "decode"
    """every row computes its last token a round, and its proposals; `num_rounds` rounds fused"""


@dataclass(frozen=True, slots=True)
class RowInit:
    """What the device must know of a row before it samples its first token.

    tokens_left: tokens it may still generate. min_position: stop ids are banned while the position
    of the sampled token is below it. sample_index: which of the request's n samples this is. seeded: the
    request brought its seed.
    """

    slot: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    seeded: bool
    sample_index: int
    tokens_left: int
    min_position: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One device call as plain data: with the checkpoint it alone determines what the device does.

    Rows come sorted: decode rows, prompt chunks of one token, longer chunks (the kernels' `distribution`).

    slots:     per row, its index in the device's RowState
    tokens:    per row, the prompt ids to compute; () means one token that only the device knows
    starts:    per row, position of its first computed token; for () rows an upper bound
    samples:   per row, whether a token is sampled after the step (False: an inner prompt chunk); decode rows always
    init_rows: rows whose device state is (re)initialised by this step
    new_pages: (slot, index of the first in the row's page table, page ids)
    prompt_logprobs: rows are scored against their own next token; prefill steps only
    next_tokens: per row, the prompt token behind its chunk, -1 where the prompt ends; with prompt_logprobs only
    num_drafted: per row, proposals wanted in each round; () where no row drafts
    cached:    (slot, first tokens of a row that begins) of rows whose pages come from the prefix cache in part, where
               the engine speculates: a drafter may want the tokens
    """

    step_id: int
    kind: StepKind
    num_rounds: int
    sampler: SamplerForm
    slots: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    samples: tuple[bool, ...]
    init_rows: tuple[RowInit, ...] = ()
    new_pages: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    prompt_logprobs: bool = False
    next_tokens: tuple[int, ...] = ()
    num_drafted: tuple[int, ...] = ()
    cached: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Packed tokens of the step (T before padding), one round."""
        return sum(map(len, self.tokens)) + self.num_decode_rows

    @property
    def num_decode_rows(self) -> int:
        """The first rows: those with one token that only the device knows."""
        return self.tokens.count(())


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability and rank (1 is the most likely) of the chosen token, and the top alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class StepResult:
    """What the host learns from one step, in the order of the plan's rows.

    tokens: per row, the sampled ids (at most one a round, and the kept proposals; fewer when the row stopped).
    logprobs: per row a TokenLogprobs for each sampled id, when the FULL sampler ran.
    prompt_logprobs: per row, a TokenLogprobs for each computed prompt position's *next* token.
    round_counts: per row, its tokens in each round that it took part in; [] where no round brings more than one.
    made_counts: per row, the proposals made for it in each of those rounds.
    """

    tokens: list[list[int]]
    logprobs: Sequence[list[TokenLogprobs]] | None = None
    prompt_logprobs: Sequence[list[TokenLogprobs]] | None = None
    round_counts: Sequence[list[int]] = ()
    made_counts: Sequence[list[int]] = ()


@dataclass(slots=True)
class RequestStats:
    """Times are time.monotonic() seconds."""

    arrival: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class TokenChunk:
    """New tokens of one sample of one request, as the engine emits them.

    finish_reason: None while it runs, then "stop" (a stop id), "length", "abort" or "error".
    stop_reason: the stop id that matched; None for end-of-sequence. `error` is set with "error".
    stats: in the first and the last chunk of a sample; one object, which the engine goes on writing to.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    stats: RequestStats | None = None
    error: Exception | None = field(default=None, repr=False)
