"""A device in plain Python for tests of the scheduler: real pages, real row state, a model that counts.

A page holds token ids. Every computed token is written to its page, and before a row samples, its whole context is read
back through its page table and compared with what the request must have produced by then. A wrong page, table, length
or order of steps shows at once.
"""

import random
from collections import deque
from dataclasses import dataclass, field, replace

from jaxinfer.config import EngineConfig
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.page_pool import PagePool
from jaxinfer.scheduler import Scheduler
from jaxinfer.types import (
    Request,
    SamplerForm,
    SamplingParams,
    StepKind,
    StepPlan,
    StepResult,
    TokenChunk,
    TokenLogprobs,
)

VOCAB = 50
TOP = tuple((rank, -float(rank)) for rank in range(20))


def make_config(**changes) -> EngineConfig:
    fields = {"max_model_len": 48, "num_pages": 40, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16,
              "max_decode_rounds": 1}
    return EngineConfig(**(fields | changes))


def make_request(id="a", prompt=(1, 2, 3), max_tokens=4, stop_ids=(), priority=0, arrival=0.0, cache_salt="", seed=0,
                 **params) -> Request:
    params = {"temperature": 0.0} | params
    return Request(id=id, prompt=tuple(prompt), params=SamplingParams(**params), max_tokens=max_tokens, seed=seed,
                   stop_ids=tuple(stop_ids), priority=priority, arrival=arrival, cache_salt=cache_salt)


def next_token(last: int, position: int, min_position: int, stop_ids: tuple[int, ...]) -> int:
    """The counting model: one more than the last token, past stop ids while those are banned."""
    token = (last + 1) % VOCAB
    while position < min_position and token in stop_ids:
        token = (token + 1) % VOCAB
    return token


def expected_tokens(request: Request) -> list[int]:
    """Prompt and output of a request that nothing disturbs."""
    tokens = list(request.prompt)
    min_position = len(tokens) + request.params.min_tokens
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens[-1], len(tokens), min_position, request.stop_ids))
        if tokens[-1] in request.stop_ids:
            break
    return tokens


@dataclass
class _Row:
    expected: list[int]
    left: int
    min_position: int
    stop_ids: tuple[int, ...]
    temperature: float
    table: dict[int, int] = field(default_factory=dict)
    last: int = -1
    kv_len: int = 0
    stopped: bool = False


class FakeDevice:
    """Runs plans in the order in which they are dispatched."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.expected: dict[int, list[int]] = {}  # by seed
        self.num_computed = 0
        self.reset()

    def reset(self) -> None:
        self.pages = [[-1] * self.config.page_size for _ in range(self.config.num_pages)]
        self.rows: dict[int, _Row] = {}

    def run(self, plan: StepPlan) -> StepResult:
        self._check_shape(plan)
        for init in plan.init_rows:
            self.rows[init.slot] = _Row(self.expected[init.seed], init.tokens_left, init.min_position, init.stop_ids,
                                        init.temperature)
        for slot, first, pages in plan.new_pages:
            table = self.rows[slot].table
            assert pages, "an entry without pages"
            assert all(first + offset not in table for offset in range(len(pages))), "a page table is append-only"
            table.update({first + offset: page for offset, page in enumerate(pages)})
        tokens: list[list[int]] = [[] for _ in plan.slots]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in plan.slots]
        for _ in range(plan.num_rounds):
            for row in range(len(plan.slots)):
                self._run_row(plan, row, tokens[row], logprobs[row])
        return StepResult(tokens, logprobs if plan.sampler is SamplerForm.FULL else None,
                          self._score(plan) if plan.prompt_logprobs else None)

    def _check_shape(self, plan: StepPlan) -> None:
        rows = len(plan.slots)
        assert len(plan.tokens) == len(plan.starts) == len(plan.samples) == rows == len(set(plan.slots)) > 0
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert rows <= self.config.max_num_seqs
        assert 1 <= plan.num_rounds <= self.config.max_decode_rounds
        sizes = [len(ids) or 1 for ids in plan.tokens]
        assert sizes == sorted(sizes, key=lambda size: size > 1), "rows with one query come first"
        if plan.kind is StepKind.DECODE:
            assert not any(plan.tokens) and all(plan.samples) and not plan.init_rows
        else:
            assert any(plan.tokens) and plan.num_rounds == 1

    def _run_row(self, plan: StepPlan, row: int, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        state, ids, start = self.rows[plan.slots[row]], plan.tokens[row], plan.starts[row]
        if not ids:
            assert plan.samples[row]
            assert start < len(state.expected) + 1 or state.stopped
            if state.stopped:
                return
            assert state.kv_len == start + len(tokens), "the planned position of a row that goes on is exact"
            ids, start = (state.last,), state.kv_len
        self._compute(state, ids, start)
        if plan.samples[row]:
            self._sample(plan, state, tokens, logprobs)

    def _compute(self, state: _Row, ids: tuple[int, ...], start: int) -> None:
        for position, token in enumerate(ids, start):
            self._write(state, position, token)
        state.kv_len = start + len(ids)
        self.num_computed += len(ids)
        context = [self._read(state, position) for position in range(state.kv_len)]
        assert context == state.expected[:state.kv_len], "the row reads another context than its own"

    def _sample(self, plan: StepPlan, state: _Row, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        assert plan.sampler >= SamplerForm.SIMPLE or state.temperature == 0, "GREEDY cannot serve this row"
        min_position = state.min_position if plan.sampler is SamplerForm.FULL else 0
        state.last = next_token(self._read(state, state.kv_len - 1), state.kv_len, min_position, state.stop_ids)
        state.left -= 1
        state.stopped = state.last in state.stop_ids or state.left <= 0
        tokens.append(state.last)
        logprobs.append(TokenLogprobs(state.last, -float(state.kv_len), 1, TOP))

    def _score(self, plan: StepPlan) -> list[list[TokenLogprobs]]:
        scores = []
        for ids, start, after in zip(plan.tokens, plan.starts, plan.next_tokens, strict=True):
            targets = [token for token in (*ids[1:], after) if token >= 0] if ids else []
            scores.append([TokenLogprobs(token, -float(start + 1 + offset), 1, TOP)
                           for offset, token in enumerate(targets)])
        return scores

    def _write(self, state: _Row, position: int, token: int) -> None:
        page, offset = divmod(position, self.config.page_size)
        self.pages[state.table[page]][offset] = token

    def _read(self, state: _Row, position: int) -> int:
        page, offset = divmod(position, self.config.page_size)
        return self.pages[state.table[page]][offset]


class SpeculatingDevice(FakeDevice):
    """Keeps each proposal with the chance `keeps`. What it refuses stays in the pages behind the row's length, which
    the host knows only as a bound.
    """

    def __init__(self, config: EngineConfig, keeps: float):
        super().__init__(config)
        self._keeps = keeps
        self._random = random.Random(0)

    def run(self, plan: StepPlan) -> StepResult:
        self._counts: list[list[int]] = [[] for _ in plan.slots]
        self._made: list[list[int]] = [[] for _ in plan.slots]
        result = replace(super().run(plan), seconds=self._random.choice((None, 0.01, 0.02, 0.05)))
        return replace(result, round_counts=self._counts, made_counts=self._made) if plan.num_drafted else result

    def _run_row(self, plan: StepPlan, row: int, tokens: list[int], logprobs: list[TokenLogprobs]) -> None:
        state = self.rows[plan.slots[row]]
        if plan.tokens[row]:
            super()._run_row(plan, row, tokens, logprobs)
        elif not state.stopped:
            made = min(plan.num_drafted[row], state.left - 1) if plan.num_drafted else 0
            for offset in range(1, made + 1):
                self._write(state, state.kv_len + offset, -offset)
            self._counts[row].append(self._verify(plan, state, made, tokens, logprobs))
            self._made[row].append(made)

    def _verify(self, plan: StepPlan, state: _Row, made: int, tokens: list[int], logprobs: list[TokenLogprobs]) -> int:
        """A round's number of tokens."""
        for count in range(1, made + 2):
            self._compute(state, (state.last,), state.kv_len)
            self._sample(plan, state, tokens, logprobs)
            if state.stopped or count > made or self._random.random() > self._keeps:
                return count
        raise AssertionError("a round ends behind its last proposal")


class Harness:
    """A scheduler on a fake device, with a few steps in flight; keeps what every sample received. keeps: the chance of
    a proposal where `drafts` are made.
    """

    def __init__(self, config: EngineConfig | None = None, depth: int = 0, check: bool = True,
                 drafts: DraftLengths | None = None, keeps: float = 0.0):
        self.config = config or make_config()
        self.pool = PagePool(self.config.num_pages, self.config.page_size, self.config.enable_prefix_caching)
        self.now = 0.0
        self.scheduler = Scheduler(self.config, self.pool, clock=lambda: self.now, drafts=drafts)
        self.device = FakeDevice(self.config) if drafts is None else SpeculatingDevice(self.config, keeps)
        self.depth = depth
        # Where steps in flight may bring several tokens, as many may be planned for a row that has ended.
        self.steps_a_token = 1 if drafts is None else depth + 1
        self.check = check
        self.requests: dict[str, Request] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], TokenChunk] = {}
        self.cancelled: set[tuple[str, int]] = set()
        self.scores: dict[str, list[TokenLogprobs]] = {}
        self.plans: list[StepPlan] = []
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    def add(self, request: Request) -> None:
        self.device.expected[request.seed] = expected_tokens(request)
        self.requests[request.id] = request
        for index in range(request.params.n):
            self.outputs[request.id, index] = []
        self.scheduler.add(request)
        self._check()

    def make(self, **fields) -> Request:
        """Adds a request with its own seed; arrivals count up."""
        count = len(self.requests)
        request = make_request(**({"id": f"r{count:04}", "seed": count, "arrival": float(count)} | fields))
        self.add(request)
        return request

    def plan(self) -> StepPlan | None:
        """Plans and dispatches one step."""
        preemptions = self.scheduler.metrics.preemptions
        plan = self.scheduler.plan()
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work, "stuck: work, nothing in flight, and no plan"
        else:
            assert not plan.init_rows or self.scheduler.metrics.preemptions == preemptions, "admitted and preempted"
            self.plans.append(plan)
            self.in_flight.append((plan, self.device.run(plan)))
        self._check()
        return plan

    def commit(self) -> list[TokenChunk]:
        """Reads and commits the oldest step in flight."""
        plan, result = self.in_flight.popleft()
        self.now += 1.0
        chunks = self.scheduler.commit(plan, result, self.now)
        self._receive(chunks)
        self._check()
        return chunks

    def step(self) -> list[TokenChunk]:
        """Like the engine: plans one step and commits down to `depth` steps in flight."""
        plan = self.plan()
        chunks: list[TokenChunk] = []
        while len(self.in_flight) > (self.depth if plan else 0):
            chunks += self.commit()
        return chunks

    def run(self) -> None:
        """Steps until nothing is left to do; every step must bring the work forward by a token or more, net of what
        preemption throws away."""
        max_steps = self.steps_a_token * self._tokens_left() + len(self.in_flight) + 1
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self.in_flight:
                return
            self.step()
        assert not self.scheduler.has_work and not self.in_flight, f"still busy after {max_steps} steps"

    def _tokens_left(self) -> int:
        """Prompt and output tokens of every sample that has not ended."""
        return sum(len(request.prompt) + request.max_tokens for (id, index) in self.outputs.keys() - self.ends.keys()
                   for request in (self.requests[id],))

    def cancel(self, request_id: str, index: int | None = None) -> list[TokenChunk]:
        chunks = self.scheduler.cancel(request_id, index)
        assert {chunk.finish_reason for chunk in chunks} <= {"abort" if index is None else "stop"}
        self.cancelled |= {(chunk.request_id, chunk.index) for chunk in chunks}
        self._receive(chunks)
        self._check()
        return chunks

    def fail(self) -> bool:
        """The device loses its pages and everything in flight; False when there was nothing to lose."""
        if not self.scheduler.num_running:
            return False
        self.in_flight.clear()
        self.device.reset()
        self.scheduler.requeue_all()
        self._check()
        return True

    def check_outputs(self) -> None:
        """Every sample ended once; all tokens are the counting model's."""
        assert self.ends.keys() == self.outputs.keys()
        for (request_id, index), tokens in self.outputs.items():
            request, end = self.requests[request_id], self.ends[request_id, index]
            expected = expected_tokens(request)[len(request.prompt):]
            if (request_id, index) in self.cancelled:
                assert tokens == expected[:len(tokens)]
                continue
            assert tokens == expected
            assert end.finish_reason == ("stop" if expected[-1] in request.stop_ids else "length")
            if request.params.prompt_logprobs is not None and index == 0:
                assert [(one.token_id, one.logprob) for one in self.scores[request_id]] == [
                    (token, -float(position)) for position, token in enumerate(request.prompt) if position]

    def _receive(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            key = chunk.request_id, chunk.index
            request = self.requests[chunk.request_id]
            assert key not in self.ends, "a chunk after the end"
            if chunk.prompt_logprobs is not None:
                assert chunk.index == 0 and not self.outputs[key] and chunk.request_id not in self.scores
                self.scores[chunk.request_id] = chunk.prompt_logprobs
            first = len(request.prompt) + len(self.outputs[key])
            self.outputs[key] += chunk.token_ids
            if request.params.logprobs is not None and chunk.token_ids:
                assert [(one.token_id, one.logprob, len(one.top)) for one in chunk.logprobs or ()] == [
                    (token, -float(first + offset), request.params.logprobs)
                    for offset, token in enumerate(chunk.token_ids)]
            else:
                assert chunk.logprobs is None
            if chunk.finish_reason is not None:
                self.ends[key] = chunk

    def _check(self) -> None:
        if self.check:
            self.scheduler.check_invariants()
