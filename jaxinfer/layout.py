"""Where each field lies in the one flat i32 array that goes to a step, and in the one that comes back.

Host (`batch.py` fills) and device (`steps.py` unpacks) both read it from here, so they cannot disagree.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.acceptance import Candidates
from jaxinfer.row_state import RowInits
from jaxinfer.rule_table import RuleRow
from jaxinfer.types import (
    MAX_BAD_WORD_SPELLINGS,
    MAX_BAD_WORD_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    SamplerForm,
)


def result_width(form: SamplerForm) -> int:
    """i32 a sampled token: its id; FULL adds log-probability, rank, and ids and log-probabilities of the top."""
    return 1 + 2 + 2 * MAX_LOGPROBS if form is SamplerForm.FULL else 1


ROW_FIELDS = ("slot", "q_len", "end", "on_device", "samples")
INIT_FIELDS = ("init_slot", "tokens_left", "seed_high", "seed_low", "sample_index", "seeded", "temperature", "top_k",
               "top_p", "min_p", "min_position", "scored", "ruled")
COLUMNS = {name: column for column, name in enumerate(ROW_FIELDS + INIT_FIELDS)}
STOP_COLUMN = len(COLUMNS)
ROW_WIDTH = STOP_COLUMN + MAX_STOP_IDS


class PrefillFields(NamedTuple):
    """A prefill step's inputs on the device."""

    tokens: jax.Array  # i32[T], 0 where the device knows the token
    slots: jax.Array  # i32[R], out of range in padding rows
    q_lens: jax.Array  # i32[R]
    ends: jax.Array  # i32[R], length after the step, for rows the host knows
    on_device: jax.Array  # bool[R], one decode token that only the device knows
    samples: jax.Array  # bool[R]
    inits: RowInits  # [R]
    new_pages: jax.Array  # i32[X, 3]
    distribution: jax.Array  # i32[3]
    form: jax.Array  # i32[], a SamplerForm
    watched: jax.Array  # bool[], `StepPlan.watched`


class DecodeFields(NamedTuple):
    """A decode step's inputs on the device."""

    slots: jax.Array  # i32[R]
    present: jax.Array  # bool[R], False in padding rows
    num_rounds: jax.Array  # i32[]
    new_pages: jax.Array  # i32[X, 3]


@dataclass(frozen=True)
class PrefillLayout:
    """[tokens T | rows R x ROW_WIDTH | new pages X x 3 | distribution 3 | form 1 | watched 1]"""

    num_tokens: int
    num_rows: int
    page_size: int

    @cached_property
    def num_new_pages(self) -> int:
        """X: what the tokens of a step can need; long prefix hits bring more and are entered before."""
        return self.num_tokens // self.page_size + self.num_rows

    @cached_property
    def borders(self) -> tuple[int, int, int, int]:
        """Ends of tokens, rows, new pages and distribution."""
        rows = self.num_tokens + self.num_rows * ROW_WIDTH
        pages = rows + 3 * self.num_new_pages
        return self.num_tokens, rows, pages, pages + 3

    @property
    def size(self) -> int:
        return self.borders[-1] + 2

    def views(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Writable views of tokens [T], rows [R, ROW_WIDTH], new pages [X, 3], and what is behind them [5]."""
        tokens, rows, pages, _ = self.borders
        return (flat[:tokens], flat[tokens:rows].reshape(self.num_rows, ROW_WIDTH),
                flat[rows:pages].reshape(-1, 3), flat[pages:])

    def unpack(self, flat: jax.Array) -> PrefillFields:
        """flat: i32[size]."""
        tokens, rows, pages, distribution = self.borders
        table = flat[tokens:rows].reshape(self.num_rows, ROW_WIDTH)
        columns = {name: table[:, column] for name, column in COLUMNS.items()}
        return PrefillFields(
            flat[:tokens], columns["slot"], columns["q_len"], columns["end"], columns["on_device"] > 0,
            columns["samples"] > 0, _inits(columns, table[:, STOP_COLUMN:]), flat[rows:pages].reshape(-1, 3),
            flat[pages:distribution], flat[distribution], flat[distribution + 1] > 0)


def _inits(columns: dict[str, jax.Array], stop_ids: jax.Array) -> RowInits:
    def floats(name):
        return jax.lax.bitcast_convert_type(columns[name], jnp.float32)

    words = jnp.stack([columns["seed_high"], columns["seed_low"]], axis=1)
    return RowInits(
        slot=columns["init_slot"], tokens_left=columns["tokens_left"],
        seed_words=jax.lax.bitcast_convert_type(words, jnp.uint32), sample_index=columns["sample_index"],
        seeded=columns["seeded"] > 0,
        temperature=floats("temperature"), top_k=columns["top_k"], top_p=floats("top_p"), min_p=floats("min_p"),
        min_position=columns["min_position"], scored=columns["scored"] > 0, ruled=columns["ruled"] > 0,
        stop_ids=stop_ids)


@dataclass(frozen=True)
class DecodeLayout:
    """[rounds 1 | slots R | new pages X x 3]"""

    num_rows: int
    max_rounds: int
    page_size: int
    num_slots: int

    @cached_property
    def num_new_pages(self) -> int:
        """X: pages that R rows can begin in `max_rounds` tokens."""
        return self.num_rows * (self.max_rounds // self.page_size + 1)

    @property
    def size(self) -> int:
        return 1 + self.num_rows + 3 * self.num_new_pages

    def views(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Writable views of rounds [1], slots [R] and new pages [X, 3]."""
        end = 1 + self.num_rows
        return flat[:1], flat[1:end], flat[end:].reshape(-1, 3)

    def unpack(self, flat: jax.Array) -> DecodeFields:
        """flat: i32[size]."""
        end = 1 + self.num_rows
        slots = flat[1:end]
        return DecodeFields(slots, slots < self.num_slots, flat[0], flat[end:].reshape(-1, 3))


class SpeculateFields(NamedTuple):
    """A speculative step's inputs on the device."""

    slots: jax.Array  # i32[R]
    present: jax.Array  # bool[R], False in padding rows
    num_drafted: jax.Array  # i32[R], proposals wanted a round
    num_rounds: jax.Array  # i32[]
    new_pages: jax.Array  # i32[X, 3]


@dataclass(frozen=True)
class SpeculateLayout:
    """[rounds 1 | slots R | drafted R | new pages X x 3]. num_drafted: most proposals of a row in a round."""

    num_rows: int
    max_rounds: int
    num_drafted: int
    page_size: int
    num_slots: int

    @cached_property
    def num_new_pages(self) -> int:
        """X: pages that R rows can begin in `max_rounds` rounds."""
        return self.num_rows * (self.max_rounds * (self.num_drafted + 1) // self.page_size + 1)

    @property
    def size(self) -> int:
        return 1 + 2 * self.num_rows + 3 * self.num_new_pages

    def views(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Writable views of rounds [1], slots [R], drafted [R] and new pages [X, 3]."""
        rows, end = 1 + self.num_rows, 1 + 2 * self.num_rows
        return flat[:1], flat[1:rows], flat[rows:end], flat[end:].reshape(-1, 3)

    def unpack(self, flat: jax.Array) -> SpeculateFields:
        """flat: i32[size]."""
        rows, end = 1 + self.num_rows, 1 + 2 * self.num_rows
        slots = flat[1:rows]
        return SpeculateFields(slots, slots < self.num_slots, flat[rows:end], flat[0], flat[end:].reshape(-1, 3))


class ProposalFields(NamedTuple):
    """Proposals from outside on the device."""

    slots: jax.Array  # i32[n], out of range where there are no more
    first: jax.Array  # i32[n]
    tokens: jax.Array  # i32[n, Y], -1 behind the last
    candidates: Candidates | None  # [n, Y, N]; None where N is 0


@dataclass(frozen=True)
class ProposalLayout:
    """A row each: [slot 1 | first 1 | tokens Y | ids Y x N | chances Y x N]"""

    num_entered: int
    num_candidates: int

    @cached_property
    def borders(self) -> tuple[int, int]:
        """Ends of tokens and ids."""
        tokens = 2 + self.num_entered
        return tokens, tokens + self.num_entered * self.num_candidates

    @property
    def size(self) -> int:
        tokens, ids = self.borders
        return 2 * ids - tokens

    def views(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Writable views of slot and first [n, 2], tokens [n, Y], ids [n, Y x N] and chances f32[n, Y x N]."""
        tokens, ids = self.borders
        return table[:, :2], table[:, 2:tokens], table[:, tokens:ids], table.view(np.float32)[:, ids:]

    def unpack(self, table: jax.Array) -> ProposalFields:
        """table: i32[n, size]."""
        tokens, ids = self.borders
        slots, first, said = table[:, 0], table[:, 1], table[:, 2:tokens]
        if not self.num_candidates:
            return ProposalFields(slots, first, said, None)
        shape = (*said.shape, self.num_candidates)
        chances = jax.lax.bitcast_convert_type(table[:, ids:], jnp.float32)
        return ProposalFields(slots, first, said, Candidates(table[:, tokens:ids].reshape(shape),
                                                             chances.reshape(shape)))


@dataclass(frozen=True)
class RulesLayout:
    """[slot 1 | penalties 3 | bias V | counts V | bad words X x Y | recent Y - 1], one row's token rules."""

    vocab_size: int

    @cached_property
    def borders(self) -> tuple[int, int, int, int]:
        """Ends of penalties, bias, counts and bad words."""
        bias = 4 + self.vocab_size
        counts = bias + self.vocab_size
        return 4, bias, counts, counts + MAX_BAD_WORD_SPELLINGS * MAX_BAD_WORD_TOKENS

    @property
    def size(self) -> int:
        return self.borders[-1] + MAX_BAD_WORD_TOKENS - 1

    def views(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Writable views of penalties f32[3], bias f32[V], counts [V], bad words [X, Y] and recent [Y - 1]."""
        penalties, bias, counts, words = self.borders
        floats = flat.view(np.float32)
        return (floats[1:penalties], floats[penalties:bias], flat[bias:counts],
                flat[counts:words].reshape(-1, MAX_BAD_WORD_TOKENS), flat[words:])

    def unpack(self, flat: jax.Array) -> tuple[jax.Array, RuleRow]:
        """The slot i32[] and its rules; flat: i32[size]."""
        _, bias, counts, words = self.borders
        floats = jax.lax.bitcast_convert_type(flat[1:bias], jnp.float32)
        return flat[0], RuleRow(floats[:3], floats[3:], flat[bias:counts],
                                flat[counts:words].reshape(-1, MAX_BAD_WORD_TOKENS), flat[words:])
