"""Runs plans on the device: packs, calls the compiled program, reads the one result array back."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer import round_seconds, row_state, steps
from jaxinfer.batch import Batcher, pack_rules
from jaxinfer.config import EngineConfig
from jaxinfer.draft_lengths import CatchUp
from jaxinfer.draft_pair import DraftPair, Pair, has_plain_programs
from jaxinfer.finite import NOT_FINITE
from jaxinfer.layout import DecodeLayout, PrefillLayout, SpeculateLayout, result_width
from jaxinfer.model import Model
from jaxinfer.programs import (
    APPEND,
    CATCH_UP,
    EXTRA_PAGES,
    LOGITS,
    PROPOSALS,
    RULES,
    SAMPLE,
    SAMPLE_LEGAL,
    SCORE,
    Key,
    Signature,
    compile_all,
    declare,
    decode_key,
    prefill_key,
    propose_key,
    verify_key,
)
from jaxinfer.results import RowLogprobs, read_scores
from jaxinfer.round_clock import Seconds
from jaxinfer.types import CaughtUp, SamplerForm, StepKind, StepPlan, StepResult, TokenLogprobs, mask_width

CATCH_UPS = 3
"""How often it is timed at start, the first time with whatever a first call brings."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A step that samples only under masks i32[mask_shape]. key: of the program that does. arguments: i32 inputs of a
    speculative round, and what the first half of the step has left. proposed: i32[R, X], -1 behind the last.
    """

    key: Key
    arguments: tuple[Any, ...]
    mask_shape: tuple[int, ...]
    proposed: jax.Array | None = None


@dataclass(slots=True)
class InFlight:
    """A dispatched step whose results have not been read."""

    plan: StepPlan
    result: Any
    """None while `unfinished`. After prefill i32[R, W] (bool[R] of broken rows, if none samples), after decode
    i32[rounds, R, W], after speculation i32[rounds, R, X + 1, W]."""
    scores: list[jax.Array]  # i32[X, W - 1] a chunk of scored prompt
    unfinished: "Unfinished | None" = None
    """Where the plan is constrained, until `Executor.sample`."""


class Executor:
    """Owns the device state of one engine. Not thread-safe: one thread calls it."""

    def __init__(self, model: Model, params: Any, config: EngineConfig, replicated: jax.sharding.Sharding):
        """replicated: a sharding that puts a whole array on every device of the model's mesh."""
        self._model = model
        self._params = params
        self.config = config
        self._replicated = replicated
        self._batcher = Batcher(config, has_plain_programs(model))
        self._programs: dict[Any, jax.stages.Compiled] = {}
        self._state: Any = self._new_state()

    def _new_state(self) -> steps.DeviceState:
        return steps.DeviceState(self._model.new_pages(self.config.num_pages, self.config.page_size), self._no_rows())

    def _no_rows(self) -> row_state.RowState:
        return row_state.empty(self.config.max_num_seqs, self.config.max_pages_per_row, self._model.vocab_size,
                               self._replicated)

    def reset(self) -> None:
        """Fresh pages and row state, after a failed step has taken the donated ones along, or may have. What is left of
        them goes first: memory holds them once.
        """
        for leaf in jax.tree.leaves(self._state):
            if not leaf.is_deleted():
                leaf.delete()
        self._state = self._new_state()

    def free(self) -> None:
        """Lets go of parameters, pages and programs; the executor is of no use afterwards."""
        self._programs = {}
        self._params = self._state = None

    @property
    def signature(self) -> Signature:
        return Signature(self._model, self._params, self._state, self._batcher, self._replicated)

    @property
    def num_declared(self) -> int:
        """Programs that `warm_up` compiles."""
        return len(declare(self.signature))

    def warm_up(self, workers: int, progress: Callable[[str], None]) -> int:
        """Compiles every declared program; returns how many."""
        self._programs = compile_all(declare(self.signature), workers, progress)
        return len(self._programs)

    def measure_rounds(self) -> Seconds:
        """What decode rounds take with and without proposals; for an engine that speculates, before it serves."""
        self._insist(True)
        speculate = self._batcher.speculate
        layouts = zip(self._batcher.plain or speculate, speculate, strict=True)
        found = round_seconds.measure(self.config, list(layouts), self._timed)
        self._insist(False)
        self._state = self._state._replace(rows=self._no_rows())
        return found

    @property
    def pair(self) -> DraftPair:
        """The model of an engine that speculates."""
        if not isinstance(self._model, DraftPair):
            raise TypeError("this engine has no drafter")
        return self._model

    def measure_catch_up(self) -> CatchUp | None:
        """What it takes to tell the drafter of tokens; None for one to which prompts are no work."""
        if not self.pair.drafter.prompts_cost:
            return None
        count = min(self.pair.drafter.num_caught_up, self.config.max_model_len)
        row = CaughtUp(0, 0, (0,) * count, tuple(range(-(-count // self.config.page_size))))
        return CatchUp(count, min(self._timed_telling(row) for _ in range(CATCH_UPS)))

    def _timed_telling(self, row: CaughtUp) -> float:
        jax.block_until_ready(self._state)
        began = time.perf_counter()
        self._tell(row, 0)
        jax.block_until_ready(self._state)
        return time.perf_counter() - began

    def _insist(self, on: bool) -> None:
        self._state = self._state._replace(kv_pages=self.pair.insist(self._state.kv_pages, on))

    def _timed(self, layout: DecodeLayout | SpeculateLayout, form: SamplerForm, inputs: np.ndarray, steps: int
               ) -> float:  # fmt: skip
        busy = round_seconds.busy_rows(self.config, self._no_rows(), self._replicated)
        self._state = jax.block_until_ready(self._state._replace(rows=busy))
        running, ends = self._decode(layout, form, inputs), []
        for _ in range(steps - 1):
            behind = self._decode(layout, form, inputs)
            running.block_until_ready()
            ends.append(time.perf_counter())
            running = behind
        running.block_until_ready()
        return (ends[-1] - ends[0]) / (steps - 2)

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Starts the step and returns at once; the arrays in the result are futures."""
        layout, flat, extra = self._batcher.pack(plan)
        if len(extra):
            self._append(extra)
        for init in plan.init_rows:
            if init.ruled is not None:
                rules = self._put(pack_rules(init.slot, init.ruled, self._model.vocab_size))
                self._state = self._state._replace(rows=self._programs[RULES](self._state.rows, rules))
        if CATCH_UP in self._programs:
            self._catch_up(plan)
        if plan.proposals:
            self._enter_proposals(plan)
        if isinstance(layout, PrefillLayout):
            return self._prefill(plan, layout, flat)
        if isinstance(layout, SpeculateLayout) and plan.constrained:
            return self._propose(plan, layout, self._put(flat))
        result = self._decode(layout, plan.sampler, flat)
        result.copy_to_host_async()
        return InFlight(plan, result, [])

    def _decode(self, layout: DecodeLayout | SpeculateLayout, form: SamplerForm, flat: np.ndarray) -> jax.Array:
        """The results of a decode step with the inputs `flat`."""
        # The call takes the array of the host as it is: half the cost of a device_put before it.
        program = self._programs[decode_key(layout, form)]
        if not self._batcher.plain or isinstance(layout, SpeculateLayout):
            self._state, result = program(self._params, self._state, flat)
            return result
        params: Any = self._params
        (pages, draft), rows = self._state
        (pages, rows), result = program(params.target, steps.DeviceState(pages, rows), flat)
        self._state = steps.DeviceState(Pair(pages, draft), rows)
        return result

    def _prefill(self, plan: StepPlan, layout: PrefillLayout, flat: np.ndarray) -> InFlight:
        if plan.constrained:
            self._state, left, hidden = self._programs[prefill_key(layout)](self._params, self._state, flat)
            result, unfinished = None, Unfinished(SAMPLE_LEGAL, (left,), (layout.num_rows, self._mask_width))
        else:
            self._state, result, hidden = run_prefill(
                self._programs, layout, self._params, self._state, flat, any(plan.samples))
            result.copy_to_host_async()
            unfinished = None
        return InFlight(plan, result, self._score(plan, hidden) if plan.prompt_logprobs else [], unfinished)

    def _propose(self, plan: StepPlan, layout: SpeculateLayout, inputs: jax.Array) -> InFlight:
        self._state, drafted = self._programs[propose_key(layout)](self._params, self._state, inputs)
        drafted.tokens.copy_to_host_async()
        shape = (layout.num_rows, layout.num_drafted + 1, self._mask_width)
        return InFlight(plan, None, [], Unfinished(verify_key(layout), (inputs, drafted), shape, drafted.tokens))

    @property
    def _mask_width(self) -> int:
        return mask_width(self._model.vocab_size)

    def proposed(self, step: InFlight) -> list[list[int]] | None:
        """What was proposed to the rows of a constrained step; None where nobody proposes. Waits for it."""
        if step.unfinished is None or step.unfinished.proposed is None:
            return None
        table = np.asarray(step.unfinished.proposed)[:len(step.plan.slots)]
        return [[token for token in row if token >= 0] for row in table.tolist()]

    def sample(self, step: InFlight, masks: np.ndarray) -> None:
        """What the grammars of a constrained step's rows allow, i32 of its `mask_shape`: now its tokens are sampled."""
        unfinished, step.unfinished = step.unfinished, None
        if unfinished is None:
            raise ValueError("the step has sampled")
        program, arguments = self._programs[unfinished.key], (*unfinished.arguments, self._put(masks))
        if unfinished.key == SAMPLE_LEGAL:
            rows, step.result = program(self._params, self._state.rows, *arguments)
            self._state = self._state._replace(rows=rows)
        else:
            self._state, step.result = program(self._params, self._state, *arguments)
        step.result.copy_to_host_async()

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._replicated)

    def _append(self, extra: np.ndarray) -> None:
        for first in range(0, len(extra), EXTRA_PAGES):
            chunk = np.full((EXTRA_PAGES, 3), self._batcher.no_slot, np.int32)
            part = extra[first:first + EXTRA_PAGES]
            chunk[:len(part)] = part
            self._state = self._programs[APPEND](self._state, self._put(chunk))

    def _catch_up(self, plan: StepPlan) -> None:
        drafter = self.pair.drafter
        for row in plan.caught_up:
            begin = row.num_watched if drafter.prompts_cost else 0
            for first in range(begin, len(row.tokens), drafter.num_caught_up):
                self._tell(row, first)

    def _tell(self, row: CaughtUp, first: int) -> None:
        """The drafter gets the next tokens of a row from `first` on."""
        count = self.pair.drafter.num_caught_up
        told, part = np.full(2 + count + self.config.max_pages_per_row, -1, np.int32), row.tokens[first:first + count]
        told[:2], told[2:2 + len(part)] = (row.slot, first), part
        told[2 + count:] = 0
        told[2 + count:2 + count + len(row.pages)] = row.pages
        self._state = self._programs[CATCH_UP](self._params, self._state, self._put(told))

    def _enter_proposals(self, plan: StepPlan) -> None:
        table = self._batcher.pack_proposals(plan, self.pair.proposal_layout)
        self._state = self._programs[PROPOSALS](self._state, self._put(table))

    def _score(self, plan: StepPlan, hidden: jax.Array) -> list[jax.Array]:
        """Scores of every packed position against the token packed behind it."""
        packed = [token for ids, after in zip(plan.tokens, plan.next_tokens, strict=True)
                  for token in (*ids[1:], after)] if plan.next_tokens else []
        chunk = min(steps.SCORE_CHUNK, hidden.shape[0])
        return [self._score_chunk(hidden, first, packed[first:first + chunk], chunk)
                for first in range(0, len(packed), chunk)]

    def _score_chunk(self, hidden: jax.Array, first: int, targets: list[int], size: int) -> jax.Array:
        padded = np.zeros(size, np.int32)
        padded[:len(targets)] = targets
        start = np.int32(first)
        return self._programs[SCORE](self._params, hidden, self._put(np.asarray(start)), self._put(padded))

    @staticmethod
    def is_ready(step: InFlight) -> bool:
        """Whether `read` would not wait. For steps that have sampled."""
        return step.result.is_ready()

    def read(self, step: InFlight) -> StepResult:
        """Waits for the step and unpacks what it sampled."""
        array = np.asarray(step.result)
        if not any(step.plan.samples):
            broken = np.flatnonzero(array[:len(step.plan.slots)]).tolist()
            return StepResult([[] for _ in step.plan.slots], prompt_logprobs=self._read_scores(step), broken=broken)
        full = step.plan.kind is StepKind.PREFILL or step.plan.constrained
        form = SamplerForm.FULL if full else step.plan.sampler
        round_counts, made_counts = [], []
        if array.ndim == 4 and not step.plan.num_drafted:
            array = array[:, :, 0]
        elif array.ndim == 4:  # one token more a round, and so on: as if they were rounds
            round_counts, made_counts = counts_of_rounds(array[:, :len(step.plan.slots), :, 0])
            array = array.swapaxes(1, 2).reshape(-1, array.shape[1], array.shape[3])
        table = array.reshape(-1, array.shape[-2], result_width(form))[:, :len(step.plan.slots)]
        tokens = sampled_tokens(table[:, :, 0])
        logprobs = RowLogprobs(table, tokens) if step.plan.sampler is SamplerForm.FULL else None
        broken = np.flatnonzero((table[:, :, 0] == NOT_FINITE).any(axis=0)).tolist()
        return StepResult(tokens, logprobs, self._read_scores(step), round_counts, made_counts, broken)

    def _read_scores(self, step: InFlight) -> list[list[TokenLogprobs]] | None:
        return read_scores(step.plan, [np.asarray(chunk) for chunk in step.scores]) if step.scores else None

    def logits(self, plan: StepPlan) -> np.ndarray:
        """f32[n, V] of the one prompt chunk in `plan`, a prefill step of the largest bucket."""
        _, flat, extra = self._batcher.pack(plan)
        self._append(extra)
        program = self._programs[prefill_key(self._batcher.prefill[-1])]
        self._state, _, hidden = program(self._params, self._state, self._put(flat))
        count, chunk = plan.num_tokens, min(steps.SCORE_CHUNK, hidden.shape[0])
        parts = []
        for first in range(0, count, chunk):
            # The last chunk starts earlier where the bucket ends: dynamic_slice would clamp it silently.
            start = min(first, hidden.shape[0] - chunk)
            part = np.asarray(self._programs[LOGITS](self._params, hidden, self._put(np.asarray(np.int32(start)))))
            parts.append(part[first - start:])
        return np.concatenate(parts)[:count]


def run_prefill(programs: Mapping[Key, Any], layout: PrefillLayout, params: Any, state: steps.DeviceState,
                flat: np.ndarray | jax.Array, samples: bool) -> tuple[steps.DeviceState, jax.Array, jax.Array]:
    """The state, the packed results and the hidden states after a prefill step and, if any of its rows `samples`, the
    program behind it. Otherwise bool[R] stands in for the results: rows that are broken (`finite`).
    """
    state, unsampled, hidden = programs[prefill_key(layout)](params, state, flat)
    if not samples:
        return state, unsampled.broken, hidden
    rows, result = programs[SAMPLE](params, state.rows, unsampled)
    return state._replace(rows=rows), result, hidden


def counts_of_rounds(ids: np.ndarray) -> tuple[list[list[int]], list[list[int]]]:
    """How many tokens i32[rounds, R, X + 1] has, and how many proposals were made (kept ones are tokens, others are
    `speculative_step.REFUSED`, -1 is nothing), of each row in each round that it took part in.
    """
    tokens, made = (ids >= 0).sum(axis=2).T, (ids[:, :, 1:] != -1).sum(axis=2).T

    def where_any(counts: np.ndarray) -> list[list[int]]:
        return [row[present].tolist() for row, present in zip(counts, tokens > 0, strict=True)]

    return where_any(tokens), where_any(made)


def sampled_tokens(ids: np.ndarray) -> list[list[int]]:
    """Tokens of each row from i32[rounds, R], in which -1 stands for none."""
    if len(ids) == 1:
        return [[token] if token >= 0 else [] for token in ids[0].tolist()]
    return [[token for token in row if token >= 0] for row in ids.T.tolist()]
