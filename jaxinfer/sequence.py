"""One sample of one request while the scheduler holds it. No jax here."""

from jaxinfer.acceptance_rate import AcceptanceRate
from jaxinfer.errors import InvalidRequest
from jaxinfer.page_pool import Digest
from jaxinfer.types import Request, RequestStats, RowInit, Ruled, SamplerForm, TokenLogprobs

NO_SLOT = -1


class Sequence:
    """Known tokens, how far their computation is planned, and the pages that hold it.

        prompt of 6 tokens, max_tokens 5; two tokens are committed, one more is in flight

        position     0   1   2   3   4   5   6   7   8   9   10
        tokens     |<------ prompt ------->|<----->|                known: len(tokens) = 8
        computed   |<------------------------------->|              planned = 8: position 7 is in flight
        end        |<--------------------------------------->|     end = 10: the last token is never computed

    `planned` counts the tokens whose keys and values the steps planned so far compute. While it is below len(tokens)
    the row computes known ids, a chunk a step. The chunk that reaches the last of them samples, and from then on the
    row is `decoding`: each round computes the token sampled last, which only the device knows. A row that the device
    stops computes less than planned, so `planned` is exact for rows that go on and an upper bound for the others.
    Where it reaches `end`, all max_tokens are certainly sampled and nothing more is planned.

    With speculation a round brings one token or several. `flights` holds, for each step in flight that samples, the
    fewest and the most tokens it brings; `planned` is the upper bound of all of them, `certain` the lower one (of a row
    that does not stop).
    """

    __slots__ = (  # noqa: RUF023 (grouped by what they tell)
        "request", "request_id", "sample_index", "key", "num_prompt", "end", "stop_ids",  # what was asked for
        "form", "full_below", "num_logprobs", "num_prompt_logprobs",
        "tokens", "scores", "finished", "stats",  # what is known
        "slot", "pages", "capacity", "planned", "certain", "decoding", "flights",  # what the running row has
        "hashes", "registered", "register_at", "awaited",  # its blocks in the prefix cache
        "num_drafted", "watched", "seen", "acceptance", "making",  # of a row that speculates
        "matcher",  # its place in its grammar, behind the known tokens; None without one
        "quiet_until",  # known tokens up to which new ones need no bookkeeping; 0 until the row has sampled
    )

    def __init__(self, request: Request, sample_index: int):
        params = request.params
        self.request = request
        self.matcher = None if request.grammar is None else request.grammar.matcher()
        self.request_id = request.id
        self.sample_index = sample_index
        self.key = (request.priority, request.arrival, request.id, sample_index)
        self.num_prompt = len(request.prompt)
        self.end = self.num_prompt + request.max_tokens - 1
        self.stop_ids = request.stop_ids
        self.form = _sampler_form(request)
        # Below it the next token may not be a stop id, which only the FULL sampler forbids.
        self.full_below = self.num_prompt + params.min_tokens - 1 if request.stop_ids else 0
        self.num_logprobs = params.logprobs
        self.num_prompt_logprobs = params.prompt_logprobs if sample_index == 0 else None
        self.tokens = list(request.prompt)
        self.finished = False
        self.stats = RequestStats(arrival=request.arrival, num_prompt_tokens=self.num_prompt)
        self.watched = True  # the drafter computes its prompt, without which it is not asked
        self.acceptance = AcceptanceRate()
        self.making = AcceptanceRate()  # of rounds: those asked for proposals, those that had any
        self.hashes: list[Digest] = []
        self.awaited: Digest | None = None
        # Prompt log-probabilities so far; None when not wanted or delivered. One sample has them for all.
        self.scores: list[TokenLogprobs] | None = None if self.num_prompt_logprobs is None else []
        self.restart()

    def restart(self) -> None:
        """Back to the state before the first step; known tokens and what was delivered stay."""
        self.slot = NO_SLOT
        self.pages: list[int] = []
        self.capacity = 0
        self.planned = 0
        self.certain = 0  # set for decode rows that speculate
        self.decoding = False
        self.flights: list[tuple[int, int]] = []
        self.num_drafted = 0  # proposals a round in the next step
        # Of a watched row that has had steps which its drafter did not see: the first tokens, which it did see.
        self.seen: int | None = None
        self.registered = 0
        self.register_at = 0
        self.quiet_until = 0
        if self.scores is not None:
            self.scores = []

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that no step computes yet."""
        return 0 if self.decoding else len(self.tokens) - self.planned

    @property
    def num_in_flight(self) -> int:
        """Of a decode row that speculates: tokens that the steps in flight bring at most."""
        return sum(most for _, most in self.flights)

    def take_off_first(self) -> None:
        """The chunk of the last known token is planned, which samples one."""
        self.flights.append((1, 1))
        self.certain = self.planned

    def take_off(self, fewest: int, most: int) -> None:
        """A step of a decode row is planned that samples so many tokens."""
        self.flights.append((fewest, most))
        self._bound(self.certain + fewest, self.planned + most)

    def land(self) -> None:
        """The oldest step that samples has brought its tokens."""
        fewest, most = self.flights.pop(0)
        if fewest < most:  # otherwise they were counted already
            known = len(self.tokens) - 1
            self._bound(known + sum(fewest for fewest, _ in self.flights), known + self.num_in_flight)

    def _bound(self, certain: int, planned: int) -> None:
        end = self.end  # no calls of min(): this runs in every step for each row
        self.certain = certain if certain < end else end
        self.planned = planned if planned < end else end

    def hold(self, slot: int, pages: list[int], num_computed: int, page_size: int) -> None:
        """The row runs: it has a slot and pages, and `num_computed` tokens came with them."""
        self.slot = slot
        self.pages = pages
        self.capacity = len(pages) * page_size
        self.planned = num_computed

    def row_init(self) -> RowInit:
        """The device's view of this row, as it starts or resumes."""
        request, params = self.request, self.request.params
        return RowInit(
            slot=self.slot, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
            seed=request.seed, seeded=params.seed is not None, sample_index=self.sample_index,
            tokens_left=self.end + 1 - len(self.tokens), min_position=self.num_prompt + params.min_tokens,
            stop_ids=request.stop_ids, scored=params.logprobs is not None, ruled=self._ruled())

    def _ruled(self) -> Ruled | None:
        rules = self.request.rules
        if rules is None:
            return None
        return Ruled(rules, self.request.prompt, tuple(self.tokens[self.num_prompt:]))


def refuse_endless(request: Request, max_model_len: int) -> None:
    """Raises InvalidRequest for what could not be planned to its end. Fronts validate more, and earlier."""
    length = len(request.prompt) + request.max_tokens
    if not request.prompt or request.max_tokens < 1:
        raise InvalidRequest("prompt", "needs at least one prompt token and max_tokens of at least 1")
    if length > max_model_len:
        raise InvalidRequest("max_tokens", f"prompt and max_tokens={request.max_tokens} are {length} tokens, over "
                             f"max_model_len={max_model_len}; shorten one of them")


def _sampler_form(request: Request) -> SamplerForm:
    """The smallest sampler for a row that is past its minimum length."""
    if request.params.logprobs is not None or request.rules is not None:
        return SamplerForm.FULL
    return SamplerForm.GREEDY if request.params.temperature == 0 else SamplerForm.SIMPLE
