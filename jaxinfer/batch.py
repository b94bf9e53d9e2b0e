"""A plan to the padded, flat array of its bucket. The only place that pads."""

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.layout import (
    COLUMNS,
    ROW_WIDTH,
    STOP_COLUMN,
    DecodeLayout,
    PrefillLayout,
    ProposalLayout,
    RulesLayout,
    SpeculateLayout,
)
from jaxinfer.rule_table import IN_PROMPT
from jaxinfer.types import RowInit, Ruled, StepKind, StepPlan

INIT_SLOT = COLUMNS["init_slot"]
UINT32 = 0xFFFFFFFF

type Layout = PrefillLayout | DecodeLayout | SpeculateLayout


@dataclass(frozen=True)
class Batcher:
    """Packs plans for one engine: its buckets and their layouts.

    plain_alone: a speculating engine has programs of the target alone for steps without proposals; `plain` are theirs.
    """

    config: EngineConfig
    plain_alone: bool = False
    prefill: tuple[PrefillLayout, ...] = field(init=False)
    decode: tuple[DecodeLayout | SpeculateLayout, ...] = field(init=False)
    plain: tuple[DecodeLayout, ...] = field(init=False)

    def __post_init__(self):
        config = self.config
        object.__setattr__(self, "prefill", tuple(
            PrefillLayout(size, config.max_num_seqs, config.page_size) for size in config.token_buckets))
        plain = tuple(DecodeLayout(num_rows, config.max_decode_rounds, config.page_size, config.max_num_seqs)
                      for num_rows in config.row_buckets)
        object.__setattr__(self, "decode", tuple(
            SpeculateLayout(num_rows, config.max_decode_rounds, config.num_speculative_tokens, config.page_size,
                            config.max_num_seqs)
            for num_rows in config.row_buckets) if config.num_speculative_tokens else plain)
        object.__setattr__(self, "plain", plain if self.plain_alone else ())

    @property
    def speculate(self) -> tuple[SpeculateLayout, ...]:
        """Those of `decode` that speculate: all or none."""
        return tuple(layout for layout in self.decode if isinstance(layout, SpeculateLayout))

    @property
    def no_slot(self) -> int:
        """A slot out of range: reads give the scratch slot, writes are dropped."""
        return self.config.max_num_seqs + 1

    def layout(self, plan: StepPlan) -> Layout:
        """The smallest bucket that holds the plan. Scored prompts use the largest, the only one compiled for it."""
        if plan.kind is StepKind.DECODE:
            layouts = self.plain if self.plain and not plan.num_drafted else self.decode
            return layouts[bisect_left(self.config.row_buckets, len(plan.slots))]
        if plan.prompt_logprobs:
            return self.prefill[-1]
        return self.prefill[bisect_left(self.config.token_buckets, plan.num_tokens)]

    def pack(self, plan: StepPlan) -> tuple[Layout, np.ndarray, np.ndarray]:
        """The bucket, its inputs i32[size], and new pages i32[X, 3] beyond what the bucket carries."""
        layout = self.layout(plan)
        if isinstance(layout, PrefillLayout):
            flat, pages = self._pack_prefill(plan, layout)
        else:
            flat, pages = self._pack_decode(plan, layout)
        return layout, flat, self._put_new_pages(plan, pages)

    def _pack_decode(self, plan: StepPlan, layout: DecodeLayout | SpeculateLayout) -> tuple[np.ndarray, np.ndarray]:
        flat = np.full(layout.size, self.no_slot, np.int32)
        rounds, slots, *drafted, pages = layout.views(flat)
        rounds[0] = plan.num_rounds
        slots[:len(plan.slots)] = plan.slots
        for each in drafted:
            each[:] = 0
            each[:len(plan.num_drafted)] = plan.num_drafted
        return flat, pages

    def _pack_prefill(self, plan: StepPlan, layout: PrefillLayout) -> tuple[np.ndarray, np.ndarray]:
        flat = np.zeros(layout.size, np.int32)
        tokens, rows, pages, tail = layout.views(flat)
        rows[:, COLUMNS["slot"]] = rows[:, INIT_SLOT] = self.no_slot
        pages[:, 0] = self.no_slot
        num_rows, num_decode_rows = len(plan.slots), plan.num_decode_rows
        rows[:num_rows, COLUMNS["slot"]] = plan.slots
        # Of decode rows only the device knows the token and the end.
        for column in ("q_len", "on_device", "samples"):
            rows[:num_decode_rows, COLUMNS[column]] = 1
        chunks, starts = plan.tokens[num_decode_rows:], plan.starts[num_decode_rows:]
        for row, ids, start, samples in zip(rows[num_decode_rows:], chunks, starts, plan.samples[num_decode_rows:],
                                            strict=False):
            row[COLUMNS["q_len"]], row[COLUMNS["end"]], row[COLUMNS["samples"]] = len(ids), start + len(ids), samples
        packed = [token for ids in chunks for token in ids]
        tokens[num_decode_rows:num_decode_rows + len(packed)] = packed
        self._put_inits(plan, rows)
        singles = num_decode_rows + sum(len(ids) == 1 for ids in chunks)
        tail[:] = singles, singles, num_rows, plan.sampler, plan.watched
        return flat, pages

    def pack_proposals(self, plan: StepPlan, layout: ProposalLayout) -> np.ndarray:
        """What drafters elsewhere propose, i32[max_num_seqs, layout.size]."""
        table = np.zeros((self.config.max_num_seqs, layout.size), np.int32)
        places, tokens, ids, chances = layout.views(table)
        places[:, 0], tokens[:] = self.no_slot, -1
        for row, one in enumerate(plan.proposals):
            places[row] = one.slot, one.first
            tokens[row, :len(one.tokens)] = one.tokens
            if one.candidates is not None:
                known, of_known = one.candidates
                ids[row, :known.size], chances[row, :known.size] = known.ravel(), of_known.ravel()
        return table

    def _put_inits(self, plan: StepPlan, rows: np.ndarray) -> None:
        floats = rows.view(np.float32)
        for index, init in enumerate(plan.init_rows):
            _put_init(rows[index], floats[index], init)

    def _put_new_pages(self, plan: StepPlan, pages: np.ndarray) -> np.ndarray:
        if not plan.new_pages:
            return pages[:0]
        triples = [(slot, first + offset, page) for slot, first, ids in plan.new_pages
                   for offset, page in enumerate(ids)]
        fitting = min(len(triples), len(pages))
        pages[:fitting] = triples[:fitting]
        return np.array(triples[fitting:], np.int32).reshape(-1, 3)


def _put_init(row: np.ndarray, floats: np.ndarray, init: RowInit) -> None:
    """Fills the init columns of one row; `floats` is the same memory as float32."""
    no_stop_ids = (-1,) * (ROW_WIDTH - STOP_COLUMN - len(init.stop_ids))
    row[INIT_SLOT:] = (
        init.slot, init.tokens_left, _word(init.seed >> 32), _word(init.seed), init.sample_index, init.seeded, 0,
        init.top_k, 0, 0, init.min_position, init.scored, init.ruled is not None, *init.stop_ids, *no_stop_ids)
    floats[COLUMNS["temperature"]] = init.temperature
    floats[COLUMNS["top_p"]] = init.top_p
    floats[COLUMNS["min_p"]] = init.min_p


def pack_rules(slot: int, ruled: Ruled, vocab_size: int) -> np.ndarray:
    """The token rules of the row at `slot`, i32[RulesLayout.size]."""
    layout, rules = RulesLayout(vocab_size), ruled.rules
    flat = np.zeros(layout.size, np.int32)
    penalties, bias, counts, bad_words, recent = layout.views(flat)
    flat[0] = slot
    penalties[:] = rules.presence_penalty, rules.frequency_penalty, rules.repetition_penalty
    if rules.allowed is not None:
        bias[:] = -np.inf
        bias[list(rules.allowed)] = 0.0
    if rules.bias:
        ids, values = zip(*rules.bias, strict=True)
        np.add.at(bias, np.asarray(ids), np.asarray(values, np.float32))
    counts[:] = np.bincount(np.asarray(ruled.output, np.int32), minlength=vocab_size)
    counts[np.asarray(ruled.prompt, np.int32)] |= IN_PROMPT
    bad_words[:] = recent[:] = -1
    for row, word in zip(bad_words, rules.bad_words, strict=False):
        row[-len(word):] = word
    said = ruled.output[-len(recent):]
    recent[len(recent) - len(said):] = said
    return flat


def _word(value: int) -> int:
    """The low 32 bits as a signed i32."""
    low = value & UINT32
    return low - (1 << 32) if low >> 31 else low
