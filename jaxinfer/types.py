"""Plain data that crosses module borders: requests, plans, results. No jax here.

Letters as in README.md: R rows of a step, V vocabulary, C tokens a page.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from jaxinfer.grammar import CompiledGrammar

MAX_STOP_IDS = 16
"""Stop ids a row can hold on the device (end-of-sequence ids included)."""

MAX_LOGPROBS = 20
"""Most log-probabilities a token; the OpenAI API has the same limit."""

MAX_CANDIDATES = MAX_LOGPROBS - 1
"""Most ids of the distribution that a token drafted elsewhere was sampled from. It is known by the log-probabilities of
its request, of which one more shows whether the last candidate is tied with tokens that are not told.
"""

MASK_BITS = 32
"""Ids of a word of a grammar's mask; id i is bit i % 32 of word i // 32, set where the id is legal."""


def mask_width(vocab_size: int) -> int:
    """Words of a mask (W)."""
    return -(-vocab_size // MASK_BITS)



MAX_BAD_WORDS = 300
MAX_BAD_WORD_SPELLINGS = 2 * MAX_BAD_WORDS
MAX_BAD_WORD_TOKENS = 16
"""Of one spelling; each word has two, at the beginning and behind a space. The device keeps so much for every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Names and defaults are vLLM's.

    temperature: 0 is greedy, and so is anything under 1e-5. top_k: 0 or -1 is off. top_p in (0, 1], min_p in [0, 1]:
    shares of probability.
    seed: any int64; None draws one. logprobs / prompt_logprobs: how many alternatives a token
    (raw, before temperature), None for none. stop: strings that end the output and are cut from it
    unless include_stop_str_in_output. max_tokens None means up to the model's length.
    presence_penalty, frequency_penalty: taken from the logit of a token once it was said, and for each time it was.
    repetition_penalty: what logits of tokens in prompt or output are divided by (negative ones multiplied); 1 is off.
    logit_bias: added to logits, by token id. allowed_token_ids: nothing else is said. banned_token_ids, bad_words: ids
    and texts that are not (a text as it is usually cut into tokens, at the beginning and within a line; it may still be
    said by other tokens, longer ones that contain it among them).
    structured_outputs: what the text must look like.
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    banned_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: str | tuple[str, ...] | list[str] | None = None
    structured_outputs: "StructuredOutput | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What changes a request's logits by token before temperature and filters. Ids lie in the vocabulary.

    bias: (id, what is added), allowed ids only if there is `allowed`; -inf forbids. allowed: None is all. bad_words:
    sequences of 2 to MAX_BAD_WORD_TOKENS ids, at most MAX_BAD_WORD_SPELLINGS, whose last token may not follow the
    others in the output.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What the output must look like: exactly one kind. Names are those of vLLM's StructuredOutputsParams.

    json: a JSON schema, as an object or its text. json_object: any JSON object. regex: an expression that the
    whole output matches (Rust's syntax: no look-around, no back references). choice: one of these strings.
    grammar: a grammar in llguidance's dialect of Lark. disable_any_whitespace: JSON without any white space
    between its tokens; otherwise a space, or a line break and indentation. `structured_output.checked` makes it
    hashable.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False

    @property
    def kind(self) -> str:
        """The name of the field that is set, the first one if there are several; "" for none."""
        set_ = (name for name in STRUCTURED_KINDS if getattr(self, name) not in (None, False))
        return next(set_, "")


STRUCTURED_KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""Fields of StructuredOutput of which a request sets one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A validated request as the scheduler sees it: nothing optional is left open.

    stop_ids: every id that ends a row (stop_token_ids, and end-of-sequence unless ignored), at most
    MAX_STOP_IDS. priority: lower runs first. arrival: time.monotonic() seconds.
    tenant: whom it is made for; set by the front that knows, never by a client. cache_salt: requests share prefix pages
    only with requests of the same tenant and salt. rules, grammar: None where params set none.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...] = ()
    priority: int = 0
    arrival: float = 0.0
    tenant: str = ""
    cache_salt: str = ""
    rules: TokenRules | None = None
    grammar: "CompiledGrammar | None" = None


class SamplerForm(enum.IntEnum):
    """The compiled samplers, smallest first; a step runs the smallest that covers its rows."""

    GREEDY = 0
    """argmax"""
    SIMPLE = 1
    """temperature, top-k, top-p, min-p with seeded noise"""
    FULL = 2
    """SIMPLE with a minimum length, token rules and log-probabilities"""


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
    request brought its seed. scored: it wants log-probabilities. ruled: what `rules` need, None without.
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
    scored: bool = False
    ruled: "Ruled | None" = None


@dataclass(frozen=True, slots=True)
class Ruled:
    """A row's token rules and its known tokens, which they look at."""

    rules: TokenRules
    prompt: tuple[int, ...]
    output: tuple[int, ...]


class CaughtUp(NamedTuple):
    """The first tokens of a row, and all of its pages. They were computed in steps that its drafter did not see: by the
    row that the pages of the prefix cache are of, or by this one when drafting did not pay.

    num_watched: those of them whose half of the pages a draft model has.
    """

    slot: int
    num_watched: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]


class Proposed(NamedTuple):
    """Tokens from a drafter elsewhere that may come at `first` and behind it, in the row at `slot`.

    candidates: ids i32[n, N] and chances f32[n, N] of what each of the n tokens was sampled from, of sum 1 (ids beside
    a chance of 0 say nothing); None where no drafter is trusted.
    """

    slot: int
    first: int
    tokens: tuple[int, ...]
    candidates: "tuple[np.ndarray, np.ndarray] | None" = None


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
    constrained: the step samples only once the host has sent the masks of its rows' grammars; a prefill step, or a
                decode step of one round with proposals
    watched:   whether a drafter to which prompts are work computes this step's; in all other steps it does not matter
    caught_up: tokens that a drafter is told before the step, where the engine speculates
    proposals: from a drafter elsewhere, entered before the step
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
    constrained: bool = False
    watched: bool = True
    caught_up: tuple[CaughtUp, ...] = ()
    proposals: tuple[Proposed, ...] = ()

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

    def trimmed(self, count: int) -> "TokenLogprobs":
        """With as many alternatives as a request asked for: a step computes as many as any may want."""
        return TokenLogprobs(self.token_id, self.logprob, self.rank, self.top[:count])


@dataclass(slots=True)
class StepResult:
    """What the host learns from one step, in the order of the plan's rows.

    tokens: per row, the sampled ids (at most one a round, and the kept proposals; fewer when the row stopped).
    logprobs: per row a TokenLogprobs for each sampled id, when the FULL sampler ran.
    prompt_logprobs: per row, a TokenLogprobs for each computed prompt position's *next* token.
    round_counts: per row, its tokens in each round that it took part in; empty where none could bring more than one.
    made_counts: per row, the proposals made for it in each of those rounds.
    broken: rows that computed NaN or infinity; their tokens, if any, are from before it.
    seconds: from the end of the step before, behind which the device went on at once; None where it had nothing to do.
    """

    tokens: list[list[int]]
    logprobs: Sequence[list[TokenLogprobs]] | None = None
    prompt_logprobs: Sequence[list[TokenLogprobs]] | None = None
    round_counts: Sequence[list[int]] = ()
    made_counts: Sequence[list[int]] = ()
    broken: Sequence[int] = ()
    seconds: float | None = None


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
    error: BaseException | None = field(default=None, repr=False)
