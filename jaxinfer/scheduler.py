"""Which rows compute which tokens next. Pure policy: no jax, and a clock for statistics only.

One rule: planned tokens chase known tokens under one token budget, running rows first. Chunked prefill, prefix hits and
preemption by recomputing are that one mechanism; `sequence.Sequence` shows the counters.

The engine plans ahead: `plan` may be called while earlier plans are still to be committed. What depends on sampled
tokens is an upper bound then, exact for every row that the device does not stop.
"""

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from operator import attrgetter

from jaxinfer.books import Books
from jaxinfer.committing import ending_of, failure, nan_failure, take_in_chunks, unexplained_end
from jaxinfer.config import EngineConfig
from jaxinfer.core import Load
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.errors import GrammarFailed, InvalidRequest
from jaxinfer.fault_points import fault_point
from jaxinfer.grammar_matcher import Matcher
from jaxinfer.metrics import Metrics
from jaxinfer.page_pool import PagePool
from jaxinfer.planning import (
    Planning,
    advance,
    advance_speculating,
    asked,
    catch_up,
    choose_lengths,
    decode_plan,
    most_left,
    num_missing,
    num_watched,
    prefill_plan,
    ready_of,
    short_of_pages,
    to_decode,
)
from jaxinfer.prefix_sharing import PrefixSharing
from jaxinfer.sequence import NO_SLOT, Sequence, refuse_endless
from jaxinfer.types import Request, SamplerForm, StepKind, StepPlan, StepResult, TokenChunk

by_key = attrgetter("key")
Chunks = list[TokenChunk]


class Scheduler:
    """Admission, planning and commit. One thread calls it (any may call `load`); plans are committed in their order."""

    def __init__(self, config: EngineConfig, pool: PagePool, clock: Callable[[], float] = time.monotonic,
                 drafts: DraftLengths | None = None):
        self.config = config
        self.pool = pool
        self.metrics = Metrics(self.load)
        self._clock = clock
        self._drafts = drafts or DraftLengths.of(config)
        self._sharing = PrefixSharing(pool)
        self._waiting: list[Sequence] = []  # both lists are sorted by key: priority, arrival, id, sample
        self._running: list[Sequence] = []
        self._requests: dict[str, list[Sequence]] = {}
        self._free_slots = list(range(config.max_num_seqs))  # a heap
        self._in_flight: dict[int, list[Sequence]] = {}  # step id to the sequences of its rows, oldest first
        self._num_prefilling = 0
        self._num_constrained = 0  # running rows that have a grammar
        self._next_step_id = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._running or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def load(self) -> Load:
        """How busy the engine is; other threads may ask (copying a list is atomic)."""
        running, waiting = self._running.copy(), self._waiting.copy()
        return Load(len(running), len(waiting), sum(seq.num_uncomputed for seq in running + waiting),
                    self.pool.num_held, self.pool.num_idle, self.pool.num_pages)

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Queues the n samples of a request."""
        if request.id in self._requests:
            raise InvalidRequest("id", f"{request.id!r} belongs to an unfinished request; choose another")
        refuse_endless(request, self.config.max_model_len)
        sequences = [Sequence(request, index) for index in range(request.params.n)]
        self._requests[request.id] = sequences
        for seq in sequences:
            insort(self._waiting, seq, key=by_key)

    def cancel(self, request_id: str, index: int | None = None) -> list[TokenChunk]:
        """Ends a request, or a sample whose text holds a stop string; their last chunks. Unknown ones are ignored.

        Steps in flight may still write to pages that are free from now on: they run before whoever gets them next.
        """
        now, reason = self._clock(), "abort" if index is None else "stop"
        return [self._end(seq, [], reason, now) for seq in list(self._requests.get(request_id, ()))
                if index is None or seq.sample_index == index]

    def fail(self, seq: Sequence, error: Exception, now: float, ids: Iterable[int] = ()) -> TokenChunk:
        """Ends a sample by an error of its own, if it has not; its last chunk, with the tokens `ids`."""
        if not seq.finished:
            self._end(seq, [], "error", now)
        return TokenChunk(seq.request_id, seq.sample_index, list(ids), None, None, "error", None, seq.stats, error)

    def requeue_all(self) -> None:
        """After a failed step, when the device's pages are lost: running rows wait again with their known tokens."""
        self.metrics.failed_steps += 1
        self._in_flight.clear()
        for seq in self._running:
            seq.restart()
            insort(self._waiting, seq, key=by_key)
        self._running.clear()
        self._free_slots = list(range(self.config.max_num_seqs))
        self._num_prefilling = self._num_constrained = 0
        self._sharing.clear()
        self.pool.reset()

    def _end(self, seq: Sequence, ids: list[int], reason: str, now: float) -> TokenChunk:
        """Takes a sequence out for good; its last chunk."""
        if seq.slot == NO_SLOT:
            self._waiting.remove(seq)
        else:
            self._stop_running(seq)
        seq.finished = True
        seq.stats.finished = now
        seq.stats.num_output_tokens = len(seq.tokens) - seq.num_prompt
        samples = self._requests[seq.request_id]
        samples.remove(seq)
        if not samples:
            del self._requests[seq.request_id]
        self.metrics.record_end(reason, seq.stats)
        return TokenChunk(seq.request_id, seq.sample_index, ids, finish_reason=reason, stats=seq.stats)

    def _stop_running(self, seq: Sequence) -> None:
        del self._running[bisect_left(self._running, seq.key, key=by_key)]
        self._num_prefilling -= not seq.decoding
        self._num_constrained -= seq.matcher is not None
        heapq.heappush(self._free_slots, seq.slot)
        # All but the token sampled last is computed; a draft model may lack the one before.
        if seq.quiet_until:
            self._sharing.register(seq, len(seq.tokens) - 1 - (self._drafts is not None))
        self._sharing.leave(seq)
        self.pool.release(seq.pages)

    # ---- plan

    def plan(self, *, single: bool = False) -> StepPlan | None:
        """The next step, of one round if `single`; it counts as dispatched. None if nothing can be planned yet."""
        plan = Planning(self.config.max_num_batched_tokens, single)
        self._plan_decodes(plan)
        self._plan_chunks(plan)
        if self._waiting and not plan.lacked_pages:
            self._admit(plan)
        if plan.chunks or (plan.decodes and self._num_constrained and not plan.drafts):
            return self._issue_prefill(plan)
        return self._issue_decode(plan) if plan.decodes else None

    def _plan_decodes(self, plan: Planning) -> None:
        """One token (or `rounds`) for each running row that is past its prompt, and pages for them."""
        rows = to_decode(self._running, speculating=self._drafts is not None)
        if not rows:
            return
        drafts = asked(self._drafts, rows, prefilling=self._num_prefilling > 0)
        late = drafts.late(rows, self.config.max_decode_rounds) if drafts else []
        ready = ready_of(late, plan.budget)
        busy = self._waiting or self._num_prefilling or self._num_constrained or len(ready) < len(late)
        if not (plan.single or busy):
            plan.rounds = min(self.config.max_decode_rounds, most_left(rows, speculating=self._drafts is not None))
        if drafts:
            choose_lengths(plan, rows, late, ready, drafts)
        short = short_of_pages(plan, rows)
        if not plan.is_least and num_missing(plan, short, self.pool.page_size) > self.pool.num_free:
            plan.rounds, plan.drafts = 1, False
            short = short_of_pages(plan, rows)
        if short:
            rows = self._reserve(plan, rows, short)
        plan.decodes = rows
        plan.budget -= len(rows)
        for seq in filter(ready.__contains__, rows):
            seq.watched = True
            catch_up(plan, seq, len(seq.tokens), self.pool)

    def _reserve(self, plan: Planning, rows: list[Sequence], short: list[Sequence]) -> list[Sequence]:
        """Gets pages for the `short` ones, best first; returns the rows that can run.

        Recomputing a row needs its tokens, so while a step is in flight a row without pages only stalls. The others
        run dry within a page, then `plan` returns None, and with nothing in flight the worst rows are preempted.
        """
        stalled: set[Sequence] = set()
        for seq in short:
            while seq.slot != NO_SLOT and not self._grow(plan, seq):
                plan.lacked_pages = True
                if self._in_flight:
                    stalled.add(seq)
                    break
                self._preempt(self._running[-1])
        return [seq for seq in rows if seq.slot != NO_SLOT and seq not in stalled]

    def _grow(self, plan: Planning, seq: Sequence) -> bool:
        """Pages for the row's next rounds; False when the pool has not enough."""
        pages = self.pool.allocate(1 if plan.is_least else num_missing(plan, [seq], self.pool.page_size))
        if pages is None:
            return False
        plan.new_pages.append((seq.slot, len(seq.pages), tuple(pages)))
        seq.pages += pages
        seq.capacity = len(seq.pages) * self.pool.page_size
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue, in its old place. Its registered pages stay findable until somebody needs them."""
        self.metrics.preemptions += 1
        seq.stats.num_preemptions += 1
        self._stop_running(seq)
        seq.restart()
        insort(self._waiting, seq, key=by_key)

    def _plan_chunks(self, plan: Planning) -> None:
        """The next chunk of each running row that is still in its prompt. It has had its pages since admission."""
        if self._num_prefilling:
            for seq in self._running:
                if not seq.decoding and plan.budget:
                    self._plan_chunk(plan, seq)

    def _plan_chunk(self, plan: Planning, seq: Sequence) -> None:
        start, known = seq.planned, len(seq.tokens)
        stop = min(known, start + plan.budget)
        seq.planned = stop
        plan.budget -= stop - start
        plan.chunks.append((seq, start, stop))
        if stop == known:
            seq.decoding = True
            if self._drafts:
                seq.take_off_first()
            self._num_prefilling -= 1

    def _admit(self, plan: Planning) -> None:
        """Starts waiting rows in their order, up to the first that finds no slot, budget or pages."""
        started: set[Sequence] = set()
        rivals = min(len(self._running) + len(self._waiting), self.config.max_num_seqs)
        for seq in self._waiting:
            if not self._free_slots or not plan.budget:
                break
            shared = self._sharing.lookup(seq)
            if shared is None:
                continue
            if not self._start(plan, seq, shared, rivals):
                break
            started.add(seq)
        if started:
            self._waiting = [seq for seq in self._waiting if seq not in started]

    def _start(self, plan: Planning, seq: Sequence, shared: list[int], rivals: int) -> bool:
        """Gives the row, one of `rivals`, a slot and all its pages, and plans its first chunk; False without pages."""
        fresh = -(-len(seq.tokens) // self.pool.page_size) - len(shared)
        # One page is left for each running row to grow into, or the new row would soon be preempted again.
        if self.pool.cost(shared, fresh) + len(self._running) > self.pool.num_free:
            return False
        self.pool.acquire(shared)
        pages = shared + (self.pool.allocate(fresh) or [])
        seq.hold(heapq.heappop(self._free_slots), pages, len(shared) * self.pool.page_size, self.pool.page_size)
        self._sharing.enter(seq, len(shared))
        insort(self._running, seq, key=by_key)
        self._num_prefilling += 1
        self._num_constrained += seq.matcher is not None
        if not seq.stats.scheduled:
            seq.stats.scheduled = self._clock()
            seq.stats.num_cached_tokens = seq.planned
            self.metrics.record_start(seq.stats)
        plan.init_rows.append(seq.row_init())
        plan.new_pages.append((seq.slot, 0, tuple(pages)))
        if self._drafts:
            seq.watched = self._drafts.watches(seq, rivals, seq.planned - num_watched(seq, self.pool))
            catch_up(plan, seq, seq.planned, self.pool)
        self._plan_chunk(plan, seq)
        return True

    def _issue_decode(self, plan: Planning) -> StepPlan:
        decodes = self._advance(plan, plan.rounds, plan.drafts)
        return decode_plan(plan, self._fly(plan.decodes), decodes, constrained=self._num_constrained > 0)

    def _advance(self, plan: Planning, rounds: int, drafts: bool) -> tuple[list[int], list[int], SamplerForm]:
        return advance_speculating(plan, rounds, drafts) if self._drafts else advance(plan.decodes, rounds)

    def _issue_prefill(self, plan: Planning) -> StepPlan:
        plan.sort_chunks()
        decodes = self._advance(plan, 1, False)
        return prefill_plan(plan, self._fly(plan.rows), decodes, constrained=self._num_constrained > 0)

    def rows_of(self, plan: StepPlan) -> list[Sequence]:
        """Of a plan in flight, in its order."""
        return self._in_flight[plan.step_id]

    def _fly(self, rows: list[Sequence]) -> int:
        step_id = self._next_step_id
        self._next_step_id += 1
        self._in_flight[step_id] = rows
        return step_id

    # ---- commit

    def commit(self, plan: StepPlan, result: StepResult, now: float, chunks: Chunks | None = None) -> Chunks:
        """Takes in what a step sampled, ends rows, fills `chunks`, an empty list. Void for plans before a requeue."""
        chunks = [] if chunks is None else chunks
        if plan.step_id not in self._in_flight:
            return chunks
        if plan.step_id != next(iter(self._in_flight)):
            raise ValueError(f"step {plan.step_id} committed before step {next(iter(self._in_flight))}")
        rows = self._in_flight.pop(plan.step_id)
        chunks += [self._break(rows[row], result.tokens[row], now) for row in result.broken if not rows[row].finished]
        if plan.kind is StepKind.PREFILL:
            take_in_chunks(plan, result, rows, self._sharing)
        if self._drafts:
            self.metrics.record_drafts(self._drafts.learn(rows, plan, result))
        logprobs, num_tokens = result.logprobs, sum(len(chunk.token_ids) for chunk in chunks)
        for row, (seq, ids, samples) in enumerate(zip(rows, result.tokens, plan.samples, strict=True)):
            if seq.finished or not samples:
                continue
            tokens, stop_ids, count = seq.tokens, seq.stop_ids, len(ids)
            tokens += ids
            num_tokens += count
            if self._drafts:
                seq.land()
            stops = count < plan.num_rounds or (ids[-1] in stop_ids)
            try:
                if stops or len(tokens) > seq.quiet_until:
                    chunk = self._take_in(seq, ids, stops, now)
                else:  # most rows of most steps
                    chunk = TokenChunk(seq.request_id, seq.sample_index, ids)
                if logprobs is not None and seq.num_logprobs is not None:
                    chunk.logprobs = [one.trimmed(seq.num_logprobs) for one in logprobs[row][:len(chunk.token_ids)]]
            except BaseException as error:  # also a panic of a grammar's library: it is this row's problem only
                chunk = self.fail(seq, failure(seq, error), now)
            chunks.append(chunk)
        fault_point("account")
        self.metrics.record_step(plan, num_tokens, now)
        return chunks

    def _break(self, seq: Sequence, ids: list[int], now: float) -> TokenChunk:
        """The last chunk of a row that computed NaN or infinity behind the tokens `ids`."""
        self.metrics.nan_rows += 1
        self._sharing.distrust(seq)
        seq.tokens += ids
        return self.fail(seq, nan_failure(seq), now, ids)

    def _take_in(self, seq: Sequence, ids: list[int], stops: bool, now: float) -> TokenChunk:
        """The chunk of a row's new tokens that end it or are its first since it started."""
        fault_point("commit", seq.request_id)
        if seq.matcher is not None:
            chunk = self._match(seq, seq.matcher, ids, stops, now)
        elif stops or len(seq.tokens) > seq.end:
            chunk = self._end_by_tokens(seq, ids, now)
        else:
            chunk = TokenChunk(seq.request_id, seq.sample_index, ids)
        if not seq.stats.first_token:
            seq.stats.first_token = now
            self.metrics.record_first_token(seq.stats)
            chunk.prompt_logprobs, seq.scores = seq.scores, None
            chunk.stats = seq.stats  # a row that a stop string ends later has no last chunk
        seq.quiet_until = seq.end if seq.matcher is None else 1
        return chunk

    def _match(self, seq: Sequence, matcher: Matcher, ids: list[int], stops: bool, now: float) -> TokenChunk:
        """The chunk of a row with a grammar: it ends where nothing may follow, whatever a round has brought behind."""
        try:
            kept = matcher.advance_to_end(ids)
        except GrammarFailed as error:
            return self.fail(seq, error, now, ids)
        if kept < len(ids) or (matcher.is_finished and ids[-1] not in seq.stop_ids):
            del seq.tokens[len(seq.tokens) - len(ids) + kept:]
            return self._end(seq, ids[:kept], "stop", now)
        if stops or len(seq.tokens) > seq.end:
            return self._end_by_tokens(seq, ids, now)
        return TokenChunk(seq.request_id, seq.sample_index, ids)

    def _end_by_tokens(self, seq: Sequence, ids: list[int], now: float) -> TokenChunk:
        """A row ends by a stop id or by its length. One the device stopped for no such reason would wait for ever."""
        ending = ending_of(seq, ids)
        if ending is None:
            return self.fail(seq, unexplained_end(), now, ids)
        chunk = self._end(seq, ids, ending.reason, now)
        chunk.stop_reason = ending.stop_id
        return chunk

    def check_invariants(self) -> None:
        """Raises AssertionError when the books of the scheduler and of its pool do not agree."""
        Books(self._running, self._waiting, self._requests, self._in_flight, self._free_slots, self.config.max_num_seqs,
              self._num_prefilling, self._num_constrained, self._drafts is not None).check()
        self._sharing.check_invariants(self._running)
        self.pool.check_invariants([seq.pages for seq in self._running])
