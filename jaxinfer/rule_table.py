"""Token rules on the device: penalties, bias, allowed and banned ids, bad words. Only the FULL sampler applies them.

They change logits before temperature and filters, for a target and its drafter alike, so that acceptance compares
distributions under the same rules. Order as in vLLM: what is forbidden or biased first, then the penalties.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.types import MAX_BAD_WORD_SPELLINGS, MAX_BAD_WORD_TOKENS

IN_PROMPT = 1 << 30
"""In a count: the token is in the prompt. The bits below count how often it was said."""


class RuleRow(NamedTuple):
    """Of one row; in a `RuleTable` of all slots."""

    penalties: jax.Array  # f32[3]: presence, frequency, repetition
    bias: jax.Array  # f32[V], -inf forbids
    counts: jax.Array  # i32[V], see IN_PROMPT
    bad_words: jax.Array  # i32[X, Y], at the right; -1 before a shorter one's first token, and in unused ones
    recent: jax.Array  # i32[Y - 1], the last tokens said; -1 before the first


class RuleTable(NamedTuple):
    """B slots. What a slot holds counts only while its row is `ruled`."""

    ruled: jax.Array  # bool[B]
    rows: RuleRow  # [B] of each


def empty(num_slots: int, vocab_size: int, placement: jax.sharding.Sharding) -> RuleTable:
    """No slot has rules."""
    def full(shape, value, dtype):
        return jnp.full((num_slots, *shape), value, dtype, device=placement)

    return RuleTable(full((), False, bool), RuleRow(
        full((3,), 0, jnp.float32), full((vocab_size,), 0, jnp.float32), full((vocab_size,), 0, jnp.int32),
        full((MAX_BAD_WORD_SPELLINGS, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
        full((MAX_BAD_WORD_TOKENS - 1,), -1, jnp.int32)))  # fmt: skip


def enter(table: RuleTable, slot: jax.Array, row: RuleRow) -> RuleTable:
    """The table with the rules of the row at `slot` i32[]; a step with the row's `RowInits` switches them on."""
    return table._replace(rows=jax.tree.map(lambda old, new: old.at[slot].set(new), table.rows, row))


def ruled_at(table: RuleTable, slots: jax.Array) -> jax.Array:
    """bool[R] of slots i32[R]; none out of range has rules."""
    return table.ruled.at[slots].get(mode="fill", fill_value=False)


def apply(table: RuleTable, slots: jax.Array, logits: jax.Array, ahead: jax.Array, num_ahead: jax.Array) -> jax.Array:
    """Logits f32[R, V] under the rules of the rows at `slots` i32[R].

    ahead: i32[R, X], tokens that follow those recorded in the table; the first `num_ahead` i32[] of each row are said.
    Costs nothing but a test where no row has rules.
    """
    ruled = ruled_at(table, slots)

    def changed():
        row = jax.tree.map(lambda field: field.at[slots].get(mode="clip"), table.rows)
        new = penalised(without_bad_words(logits + row.bias, row, ahead, num_ahead), row, ahead, num_ahead)
        return jnp.where(ruled[:, None], new, logits)

    return jax.lax.cond(jnp.any(ruled), changed, lambda: logits)


def apply_along(table: RuleTable, slots: jax.Array, logits: jax.Array, ahead: jax.Array) -> jax.Array:
    """Logits f32[R, X + 1, V], each position with the tokens `ahead` i32[R, X] of it said."""
    def at(index):
        one = jax.lax.dynamic_index_in_dim(logits, index, axis=1, keepdims=False)
        return apply(table, slots, one, ahead, index)

    def changed():
        return jnp.moveaxis(jax.lax.map(at, jnp.arange(logits.shape[1], dtype=jnp.int32)), 0, 1)

    return jax.lax.cond(jnp.any(ruled_at(table, slots)), changed, lambda: logits)


def penalised(logits: jax.Array, row: RuleRow, ahead: jax.Array, num_ahead: jax.Array) -> jax.Array:
    """Repetition as in CTRL (Keskar et al. 2019, arXiv:1909.05858, section 4.1), frequency and presence as the OpenAI
    API documents them.
    """
    num_rows, vocab_size = logits.shape
    said = jnp.where(jnp.arange(ahead.shape[1]) < num_ahead, ahead, vocab_size)
    counts = row.counts.at[jnp.arange(num_rows)[:, None], said].add(1, mode="drop")
    times = (counts & (IN_PROMPT - 1)).astype(jnp.float32)
    presence, frequency, repetition = (row.penalties[:, index, None] for index in range(3))
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, scaled, logits)
    return logits - frequency * times - presence * (times > 0)


def without_bad_words(logits: jax.Array, row: RuleRow, ahead: jax.Array, num_ahead: jax.Array) -> jax.Array:
    """-inf at the last token of each bad word whose other tokens were just said."""
    num_rows, vocab_size = logits.shape
    recent = last_tokens(row.recent, ahead, jnp.full(num_rows, num_ahead))
    beginning, last = row.bad_words[..., :-1], row.bad_words[..., -1]
    follows = jnp.all((beginning < 0) | (beginning == recent[:, None]), axis=-1) & (last >= 0)
    return logits.at[jnp.arange(num_rows)[:, None], jnp.where(follows, last, vocab_size)].set(-jnp.inf, mode="drop")


def last_tokens(recent: jax.Array, tokens: jax.Array, count: jax.Array) -> jax.Array:
    """The window i32[R, Y - 1] moved over the first `count` i32[R] of `tokens` i32[R, X]."""
    both = jnp.concatenate([recent, tokens], axis=1)
    return jnp.take_along_axis(both, count[:, None] + jnp.arange(recent.shape[1]), axis=1)


def record(table: RuleTable, slots: jax.Array, tokens: jax.Array, count: jax.Array) -> RuleTable:
    """The table after the rows at `slots` i32[R] said the first `count` i32[R] of `tokens` i32[R, X]."""
    num_slots, vocab_size = table.rows.counts.shape
    slots = jnp.where(ruled_at(table, slots), slots, num_slots)
    said = jnp.where(jnp.arange(tokens.shape[1]) < count[:, None], tokens, vocab_size)
    counts = table.rows.counts.at[slots[:, None], said].add(1, mode="drop")
    recent = last_tokens(table.rows.recent.at[slots].get(mode="clip"), tokens, count)
    rows = table.rows._replace(counts=counts, recent=table.rows.recent.at[slots].set(recent, mode="drop"))
    return table._replace(rows=rows)
