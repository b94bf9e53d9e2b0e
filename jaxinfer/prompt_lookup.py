"""Prompt lookup: a row is proposed what followed the last time its newest tokens stood in its own prompt or output.

No second model (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; the n-gram drafting of vLLM). The longest
match wins, of equal ones the latest. A proposal that reaches the row's end goes on with the proposals before it, so
text that repeats itself is proposed as far as is wanted. All of it on the device: tokens of every slot are its state.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import sharding
from jaxinfer.acceptance import Drafted
from jaxinfer.drafter import Drafter, Prefilled, Round, Told, Wanted
from jaxinfer.row_state import RowState
from jaxinfer.types import SamplerForm

LONGEST, SHORTEST = 4, 2
"""Tokens of a match. On greedy text of the demo's target, 4 proposals each: from 1 token on 61 to 71 % are kept, from 2
on 73 to 82 %, from 3 on 79 to 86 %, but of 0.84, 0.63 and 0.52 of the rounds. Matches of 6 change nothing.
"""
CHUNK = 1024
"""Positions looked through at a time: a round's cost follows the longest of its rows, not max_model_len. 64 rows take
0.3 ms where all have up to 1,024 tokens and 9 ms where one has 32,768 (2 cores of an AMD EPYC, beside other work).
"""
BEFORE = LONGEST - 1
"""Columns before position 0, so that every position has LONGEST tokens."""
NOTHING, NO_MATCH = -1, -2
"""What stands in columns that hold no token, and what matches none of them."""


class History(NamedTuple):
    """Tokens of every slot. B = max_num_seqs + 1, W = BEFORE + max_model_len in whole chunks."""

    tokens: jax.Array  # i32[B, W], position p in column BEFORE + p; old ones from the row's length on
    always: jax.Array  # bool[], rows without a match repeat their last token


@dataclass(frozen=True)
class PromptLookup(Drafter):
    """mesh: the target's."""

    num_drafted: int
    max_num_seqs: int
    max_model_len: int
    mesh: jax.sharding.Mesh | None = None
    may_decline = True
    num_caught_up = 2048

    @property
    def shape(self) -> tuple[int, int]:
        return self.max_num_seqs + 1, BEFORE + -(-self.max_model_len // CHUNK) * CHUNK

    @property
    def fixed_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    @property
    def _place(self) -> jax.sharding.Sharding:
        return sharding.replicated(self.mesh)

    def new_state(self, num_pages: int, page_size: int) -> History:
        return History(jnp.full(self.shape, NOTHING, jnp.int32, device=self._place),
                       jnp.zeros((), bool, device=self._place))  # fmt: skip

    def struct(self, num_pages: int, page_size: int) -> Any:
        tokens: Any = jax.ShapeDtypeStruct(self.shape, jnp.int32, sharding=self._place)
        always: Any = jax.ShapeDtypeStruct((), jnp.bool_, sharding=self._place)
        return History(tokens, always)

    def insist(self, state: History, on: bool) -> History:
        return state._replace(always=jax.device_put(jnp.array(on), self._place))

    def catch_up(self, params: Any, state: History, told: Told) -> History:
        positions = told.first + jnp.arange(told.tokens.shape[0])
        return put(state, jnp.full_like(told.tokens, told.slot), positions, told.tokens, told.tokens >= 0)

    def observe_prefill(self, params: Any, state: History, rows: RowState, seen: Prefilled) -> History:
        num_tokens, ends = seen.tokens.shape[0], seen.rows.cu_q_lens
        row = jnp.repeat(jnp.arange(seen.slots.shape[0]), jnp.diff(ends), total_repeat_length=num_tokens)
        computed = (jnp.arange(num_tokens) < ends[-1]) & (seen.rows.kv_lens[row] > 0)
        return put(state, seen.slots[row], seen.positions, seen.tokens, computed)

    def observe_round(self, params: Any, state: History, rows: RowState, seen: Round) -> History:
        kv_len = rows.kv_len.at[seen.slots].get(mode="clip")
        index = jnp.arange(seen.tokens.shape[1])
        slots = jnp.broadcast_to(seen.slots[:, None], seen.tokens.shape)
        return put(state, slots, kv_len[:, None] + 1 + index, seen.tokens, index < seen.count[:, None])

    def propose(self, form: SamplerForm, params: Any, state: History, rows: RowState, wanted: Wanted
                ) -> tuple[Drafted, History]:
        """None for a row without a match. The token sampled behind a prefill step is entered here."""
        slots, count = wanted.slots, wanted.count
        kv_len = rows.kv_len.at[slots].get(mode="clip")
        state = put(state, slots, kv_len, rows.last_token.at[slots].get(mode="clip"), wanted.alive)
        lengths = jnp.where(count > 0, kv_len + 1, 0)
        end, found = latest_match(state.tokens, slots, lengths)
        tokens = following(state.tokens, slots, lengths, jnp.where(found, end, lengths - 2), self.num_drafted)
        return Drafted(tokens, jnp.where(found | state.always, count, 0), None), state


def put(state: History, slots: jax.Array, positions: jax.Array, tokens: jax.Array, known: jax.Array) -> History:
    """The history with those tokens that are `known`; all of one shape."""
    columns = jnp.where(known, BEFORE + positions, state.tokens.shape[1])
    return state._replace(tokens=state.tokens.at[slots, columns].set(tokens, mode="drop"))


def latest_match(tokens: jax.Array, slots: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the newest tokens of each row stood before: the position i32[R] of the last of them, and bool[R] whether
    SHORTEST of them did.

    tokens: i32[B, W] of `History`. lengths: i32[R], tokens of each row; 0 finds nothing.
    """
    newest = newest_tokens(tokens, slots, lengths)
    most = tokens.shape[1]

    def look(chunk, best):
        first = chunk * CHUNK
        window = jax.lax.dynamic_slice_in_dim(tokens, first, CHUNK + BEFORE, axis=1).at[slots].get(mode="clip")
        position = first + jnp.arange(CHUNK, dtype=jnp.int32)
        same, matched = True, jnp.int32(0)
        for back in range(LONGEST):
            same &= window[:, BEFORE - back:BEFORE - back + CHUNK] == newest[:, back, None]
            matched += same.astype(jnp.int32)
        counts = (matched >= SHORTEST) & (position < lengths[:, None] - 1)
        return jnp.maximum(best, jnp.max(jnp.where(counts, matched * most + position, -1), axis=1))

    best = jax.lax.fori_loop(0, -(-jnp.max(lengths) // CHUNK), look, jnp.full(slots.shape, -1, jnp.int32))
    return best % most, best >= 0


def newest_tokens(tokens: jax.Array, slots: jax.Array, lengths: jax.Array) -> jax.Array:
    """i32[R, LONGEST], the last token first."""
    columns = BEFORE + lengths[:, None] - 1 - jnp.arange(LONGEST)
    found = tokens.at[slots[:, None], jnp.maximum(columns, 0)].get(mode="clip")
    return jnp.where(columns >= BEFORE, found, NO_MATCH)


def following(tokens: jax.Array, slots: jax.Array, lengths: jax.Array, end: jax.Array, count: int) -> jax.Array:
    """i32[R, count], what stands behind position `end` i32[R], begun again where the row ends."""
    before = jnp.maximum(lengths - 1 - end, 1)[:, None]
    columns = BEFORE + end[:, None] + 1 + jnp.arange(count) % before
    return jnp.maximum(tokens.at[slots[:, None], jnp.maximum(columns, 0)].get(mode="clip"), 0)
