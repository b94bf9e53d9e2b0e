"""What only the device knows of each running row, as one donated pytree.

The host plans a step ahead of what it has read, so lengths, last tokens and stops live here. One slot more than
max_num_seqs is kept: the last one is scratch for calls that belong to no row.
"""

from dataclasses import replace
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from jaxinfer import rule_table
from jaxinfer.noise import row_keys
from jaxinfer.rule_table import RuleRow, RuleTable
from jaxinfer.sampling import SamplingRows
from jaxinfer.types import MAX_STOP_IDS


@flax.struct.dataclass
class RowState:
    """A slot a row; B = max_num_seqs + 1."""

    last_token: jax.Array  # i32[B], sampled, its key and value not yet in the pages
    token_before: jax.Array  # i32[B], the last one in the pages
    kv_len: jax.Array  # i32[B], tokens whose keys and values are in the pages
    tokens_left: jax.Array  # i32[B], tokens it may still generate
    stopped: jax.Array  # bool[B]
    page_table: jax.Array  # i32[B, M]
    sampling: SamplingRows  # [B] of each
    scored: jax.Array  # bool[B], wants log-probabilities
    rules: RuleTable  # [B] of each


@flax.struct.dataclass
class RowInits:
    """Fields of rows that begin or resume in a step; `slot` is out of range for the others."""

    slot: jax.Array  # i32[R]
    tokens_left: jax.Array  # i32[R]
    seed_words: jax.Array  # u32[R, 2]
    sample_index: jax.Array  # i32[R]
    seeded: jax.Array  # bool[R]
    temperature: jax.Array  # f32[R]
    top_k: jax.Array  # i32[R]
    top_p: jax.Array  # f32[R]
    min_p: jax.Array  # f32[R]
    min_position: jax.Array  # i32[R]
    scored: jax.Array  # bool[R]
    ruled: jax.Array  # bool[R], `rule_table.enter` has brought its rules
    stop_ids: jax.Array  # i32[R, MAX_STOP_IDS]


def empty(max_num_seqs: int, max_pages_per_row: int, vocab_size: int, placement: jax.sharding.Sharding) -> RowState:
    """All slots stopped, on every device of `placement`."""
    slots = max_num_seqs + 1
    ints = partial(jnp.zeros, (slots,), jnp.int32, device=placement)
    nowhere = partial(jnp.zeros, (slots,), bool, device=placement)
    floats = partial(jnp.zeros, (slots,), jnp.float32, device=placement)
    sampling = SamplingRows(
        key=jnp.zeros((slots, 2), jnp.uint32, device=placement), seeded=nowhere(),
        temperature=floats(), top_k=ints(), top_p=floats(),
        min_p=floats(), min_position=ints(),
        stop_ids=jnp.full((slots, MAX_STOP_IDS), -1, jnp.int32, device=placement))
    return RowState(
        last_token=ints(), token_before=ints(), kv_len=ints(), tokens_left=ints(),
        stopped=jnp.ones((slots,), bool, device=placement),
        page_table=jnp.zeros((slots, max_pages_per_row), jnp.int32, device=placement), sampling=sampling,
        scored=nowhere(), rules=rule_table.empty(slots, vocab_size, placement))


def initialise(state: RowState, inits: RowInits) -> RowState:
    """The state with the rows of `inits` made new. Slots out of range are dropped."""
    def put(old, new):
        return old.at[inits.slot].set(new, mode="drop")

    old = state.sampling
    sampling = SamplingRows(
        key=put(old.key, row_keys(inits.seed_words, inits.sample_index)), seeded=put(old.seeded, inits.seeded),
        temperature=put(old.temperature, inits.temperature), top_k=put(old.top_k, inits.top_k),
        top_p=put(old.top_p, inits.top_p), min_p=put(old.min_p, inits.min_p),
        min_position=put(old.min_position, inits.min_position), stop_ids=put(old.stop_ids, inits.stop_ids))
    return replace(
        state, tokens_left=put(state.tokens_left, inits.tokens_left), stopped=put(state.stopped, False),
        sampling=sampling, scored=put(state.scored, inits.scored),
        rules=state.rules._replace(ruled=put(state.rules.ruled, inits.ruled)))


def enter_rules(state: RowState, slot: jax.Array, rules: RuleRow) -> RowState:
    """The state with the token rules of the row that begins at `slot` i32[]."""
    return replace(state, rules=rule_table.enter(state.rules, slot, rules))


def any_scored(state: RowState, slots: jax.Array, alive: jax.Array) -> jax.Array:
    """bool[]: whether a row at `slots` i32[R] that is `alive` bool[R] wants log-probabilities."""
    return jnp.any(alive & state.scored.at[slots].get(mode="clip"))


def record(state: RowState, slots: jax.Array, tokens: jax.Array, count: jax.Array) -> RowState:
    """The state whose rules know the first `count` i32[R] of `tokens` i32[R, X], just said. FULL sampler only: without
    it no row has rules.
    """
    return replace(state, rules=rule_table.record(state.rules, slots, tokens, count))


def append_pages(state: RowState, new_pages: jax.Array) -> RowState:
    """The state with pages (slot, index in the table, page id) i32[X, 3] entered; slots out of range are dropped."""
    slot, index, page = new_pages.T
    return replace(state, page_table=state.page_table.at[slot, index].set(page, mode="drop"))


def alive(state: RowState, slots: jax.Array, present: jax.Array) -> jax.Array:
    """bool[R]: the rows at `slots` i32[R] that are `present` bool[R] and have not stopped."""
    return present & ~state.stopped.at[slots].get(mode="clip")


def advance(state: RowState, slots: jax.Array, alive: jax.Array, kv_lens: jax.Array, computed: jax.Array,
            tokens: jax.Array) -> RowState:
    """The state after the rows at `slots` i32[R] that are `alive` bool[R] sampled `tokens` i32[R].

    kv_lens: i32[R], lengths in the pages after the step. computed: i32[R], the last token that is in the pages then. A
    row stops at one of its stop ids once past its minimum length, or when it has no tokens left.
    """
    return put_tokens(state, slots, alive, kv_lens, computed, tokens, jnp.ones_like(kv_lens))


def advance_many(state: RowState, slots: jax.Array, alive: jax.Array, tokens: jax.Array, count: jax.Array) -> RowState:
    """`advance` by `count` i32[R] of `tokens` i32[R, X] at once; none but the last of them is a stop id."""
    index = jnp.arange(slots.shape[0])
    last = tokens[index, jnp.maximum(count - 1, 0)]
    before = jnp.where(count > 1, tokens[index, jnp.maximum(count - 2, 0)],
                       state.last_token.at[slots].get(mode="clip"))
    kv_lens = state.kv_len.at[slots].get(mode="clip") + count
    return put_tokens(state, slots, alive, kv_lens, before, last, count)


def put_tokens(state: RowState, slots: jax.Array, alive: jax.Array, kv_lens: jax.Array, before: jax.Array,
               last: jax.Array, count: jax.Array) -> RowState:
    """`count` i32[R] tokens more, of which `last` i32[R] is not in the pages and `before` i32[R] is."""
    slots = jnp.where(alive, slots, state.kv_len.shape[0])
    stop_ids = state.sampling.stop_ids.at[slots].get(mode="clip")
    left = state.tokens_left.at[slots].get(mode="clip") - count
    hit = jnp.any(stop_ids == last[:, None], axis=-1)
    return replace(state,
        last_token=state.last_token.at[slots].set(last, mode="drop"),
        token_before=state.token_before.at[slots].set(before, mode="drop"),
        kv_len=state.kv_len.at[slots].set(kv_lens, mode="drop"),
        tokens_left=state.tokens_left.at[slots].set(left, mode="drop"),
        stopped=state.stopped.at[slots].set(hit | (left <= 0), mode="drop"))


def stop(state: RowState, slots: jax.Array, which: jax.Array) -> RowState:
    """The state with `which` bool[R] of the rows at `slots` i32[R] stopped."""
    slots = jnp.where(which, slots, state.stopped.shape[0])
    return replace(state, stopped=state.stopped.at[slots].set(True, mode="drop"))


def sampling_of(state: RowState, slots: jax.Array) -> SamplingRows:
    """Sampling fields of the rows at `slots` i32[R]; slots out of range read the scratch slot."""
    return jax.tree.map(lambda field: field.at[slots].get(mode="clip"), state.sampling)
