"""Draft, verify, accept and sample in one program: rounds fused like those of a decode step, nothing comes to the host.

In a round the draft model proposes up to X tokens a row, one after the other, and the target computes the row's last
token and all proposals at once. Rejected ones cost no copy: the row's length does not grow over them, and the next
round writes over their keys and values.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import row_state, rule_table, steps
from jaxinfer.acceptance import Drafted, Kept, accept, draft_rows
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.layout import PrefillLayout, SpeculateFields, SpeculateLayout, result_width
from jaxinfer.model import Rows
from jaxinfer.row_state import RowState
from jaxinfer.sampling import SamplingRows, sample
from jaxinfer.steps import DeviceState, Unsampled
from jaxinfer.types import SamplerForm


def prefill_step(pair: DraftPair, layout: PrefillLayout, params: Pair, state: DeviceState, inputs: jax.Array
                 ) -> tuple[DeviceState, Unsampled, jax.Array]:
    """`steps.prefill_step` with both models. Decode rows in it compute their last token alone, so before it the draft
    model computes the one before: where a round kept all of its proposals it has not seen the last of them.
    """
    fields, rows = layout.unpack(inputs), state.rows
    kv_len = rows.kv_len.at[fields.slots].get(mode="clip")
    decodes = row_state.alive(rows, fields.slots, fields.on_device & (fields.q_lens > 0))
    num_rows = layout.num_rows
    packed = Rows(jnp.where(decodes, kv_len, 0), rows.page_table.at[fields.slots].get(mode="clip"),
                  jnp.arange(num_rows + 1, dtype=jnp.int32), jnp.full(3, num_rows, jnp.int32))  # fmt: skip
    before = rows.token_before.at[fields.slots].get(mode="clip")
    _, draft = pair.draft.forward(params.draft, before, jnp.maximum(kv_len - 1, 0), state.kv_pages.draft, packed,
                                  max_q_len=1)  # fmt: skip
    state = DeviceState(Pair(state.kv_pages.target, draft), rows)
    return steps.prefill_step(pair, layout, params, state, inputs)


def speculate_step(pair: DraftPair, layout: SpeculateLayout, form: SamplerForm, params: Pair, state: DeviceState,
                   inputs: jax.Array) -> tuple[DeviceState, jax.Array]:
    """Up to `layout.max_rounds` rounds of R rows, ended early when every row has stopped.

    inputs: i32[layout.size]. Returns the state and the results i32[max_rounds, R, X + 1, result_width(form)], -1 where
    a row has no token.
    """
    fields = layout.unpack(inputs)
    rows = row_state.append_pages(state.rows, fields.new_pages)
    page_indices = rows.page_table.at[fields.slots].get(mode="clip")
    shape = (layout.max_rounds, layout.num_rows, layout.num_drafted + 1, result_width(form))

    def one_round(state):
        return speculate_round(pair, form, params, state, fields, page_indices)

    return steps.fused_rounds(one_round, DeviceState(state.kv_pages, rows), fields, shape)


def speculate_round(pair: DraftPair, form: SamplerForm, params: Pair, state: DeviceState, fields: SpeculateFields,
                    page_indices: jax.Array) -> tuple[DeviceState, jax.Array]:
    """A round that drafts, or where no row wants proposals a plain one of the target."""
    left = state.rows.tokens_left.at[fields.slots].get(mode="clip")
    alive = row_state.alive(state.rows, fields.slots, fields.present)
    # Positions behind the row's last token have no pages.
    count = jnp.where(alive, jnp.minimum(fields.num_drafted, left - 1), 0)
    return jax.lax.cond(
        jnp.any(count > 0),
        lambda state: drafting_round(pair, form, params, state, fields.slots, alive, count, page_indices),
        lambda state: plain_round(pair, form, params, state, fields, page_indices),
        state)


def plain_round(pair: DraftPair, form: SamplerForm, params: Pair, state: DeviceState, fields: SpeculateFields,
                page_indices: jax.Array) -> tuple[DeviceState, jax.Array]:
    """The target's token for each row; the draft model does not see it."""
    alone = DeviceState(state.kv_pages.target, state.rows)
    alone, result = steps.decode_round(pair.target, form, params.target, alone, fields, page_indices)
    padded = jnp.pad(result[:, None], ((0, 0), (0, pair.num_drafted), (0, 0)), constant_values=-1)
    return DeviceState(Pair(alone.kv_pages, state.kv_pages.draft), alone.rows), padded


def drafting_round(pair: DraftPair, form: SamplerForm, params: Pair, state: DeviceState, slots: jax.Array,
                   alive: jax.Array, count: jax.Array, page_indices: jax.Array) -> tuple[DeviceState, jax.Array]:
    """count: i32[R], proposals of each row."""
    rows = state.rows
    sampling = row_state.sampling_of(rows, slots)
    drafted, draft_pages = propose(pair, form, params.draft, state.kv_pages.draft, rows, slots, alive, count,
                                   page_indices, draft_rows(sampling))  # fmt: skip
    logits, target_pages = verify(pair, params.target, state.kv_pages.target, rows, slots, alive, drafted, page_indices)
    positions = rows.kv_len.at[slots].get(mode="clip") + 1
    wanted = logits
    if form is SamplerForm.FULL:
        wanted = rule_table.apply_along(rows.rules, slots, logits, drafted.tokens)
    kept = until_stop(accept(wanted, drafted, sampling, positions, form), sampling)
    kept = Kept(jnp.where(alive[:, None], kept.tokens, -1), jnp.where(alive, kept.count, 0))
    scored = row_state.any_scored(rows, slots, alive)
    rows = row_state.advance_many(rows, slots, alive, kept.tokens, kept.count)
    if form is SamplerForm.FULL:
        rows = row_state.record(rows, slots, kept.tokens, kept.count)
    return DeviceState(Pair(target_pages, draft_pages), rows), pack(logits, kept, form, scored)


def propose(pair: DraftPair, form: SamplerForm, params: Any, pages: Any, rows: RowState, slots: jax.Array,
            alive: jax.Array, count: jax.Array, page_indices: jax.Array, sampling: SamplingRows
            ) -> tuple[Drafted, Any]:  # fmt: skip
    """Proposals of the draft model, and its pages.

    count: i32[R], proposals a row wants. The first forward computes the last two tokens of every row: where the round
    before kept all of its proposals the draft model has not seen the last of them, and where it has, the same keys and
    values are written again.
    """
    num_rows, width = slots.shape[0], pair.num_drafted
    kv_len = rows.kv_len.at[slots].get(mode="clip")
    tokens = jnp.stack([rows.token_before.at[slots].get(mode="clip"), rows.last_token.at[slots].get(mode="clip")], 1)
    positions = jnp.maximum(jnp.stack([kv_len - 1, kv_len], 1), 0)
    two = jnp.arange(num_rows + 1, dtype=jnp.int32) * 2
    few = jnp.array([0, num_rows, num_rows], jnp.int32)
    hidden, pages = pair.draft.forward(
        params, tokens.reshape(-1), positions.reshape(-1), pages,
        Rows(jnp.where(alive, kv_len + 1, 0), page_indices, two, few), max_q_len=2)  # fmt: skip

    def draw(hidden, index, tokens, seen):
        logits = pair.draft.logits(params, hidden)
        if form is SamplerForm.FULL:
            logits = rule_table.apply(rows.rules, slots, logits, tokens, index)
        drawn = sample(logits, sampling, kv_len + 1 + index, form)
        seen = seen if seen is None else seen.at[:, index].set(logits)
        return tokens.at[:, index].set(drawn), seen

    def one_more(index, carry):
        tokens, seen, pages = carry
        goes_on = index < count
        last = jax.lax.dynamic_index_in_dim(tokens, index - 1, axis=1, keepdims=False)
        one = Rows(jnp.where(goes_on, kv_len + index + 1, 0), page_indices,
                   jnp.arange(num_rows + 1, dtype=jnp.int32), jnp.full(3, num_rows, jnp.int32))  # fmt: skip
        hidden, pages = pair.draft.forward(params, last, kv_len + index, pages, one, max_q_len=1)
        return *draw(hidden, index, tokens, seen), pages

    # What greedy rows are verified against is the target's own token: the drafter's distribution is of no use.
    seen = None if form is SamplerForm.GREEDY else jnp.zeros((num_rows, width, pair.vocab_size), jnp.float32)
    tokens, seen = draw(hidden[1::2], 0, jnp.zeros((num_rows, width), jnp.int32), seen)
    tokens, seen, pages = jax.lax.fori_loop(1, jnp.max(count), one_more, (tokens, seen, pages))
    return Drafted(tokens, count, seen), pages


def verify(pair: DraftPair, params: Any, pages: Any, rows: RowState, slots: jax.Array, alive: jax.Array,
           drafted: Drafted, page_indices: jax.Array) -> tuple[jax.Array, Any]:  # fmt: skip
    """The target's logits f32[R, X + 1, V] before each proposal and behind the last, and its pages.

    Rows with fewer proposals have fewer queries: what lies behind a row's last position has no pages.
    """
    num_rows, width = drafted.tokens.shape[0], drafted.tokens.shape[1] + 1
    kv_len = rows.kv_len.at[slots].get(mode="clip")
    q_lens = jnp.where(alive, drafted.count + 1, 0)
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(q_lens, dtype=jnp.int32)])
    row = jnp.repeat(jnp.arange(num_rows), q_lens, total_repeat_length=num_rows * width)
    offset = jnp.minimum(jnp.arange(num_rows * width, dtype=jnp.int32) - cu_q_lens[row], width - 1)
    padded = jnp.concatenate([rows.last_token.at[slots].get(mode="clip")[:, None], drafted.tokens], axis=1)
    few = jnp.array([0, num_rows, num_rows], jnp.int32)
    hidden, pages = pair.target.forward(
        params, padded[row, offset], kv_len[row] + offset, pages,
        Rows(jnp.where(alive, kv_len + q_lens, 0), page_indices, cu_q_lens, few), max_q_len=width)  # fmt: skip
    at = jnp.minimum(cu_q_lens[:-1, None] + jnp.arange(width), num_rows * width - 1)
    logits = pair.target.logits(params, hidden[at.reshape(-1)])
    return logits.reshape(num_rows, width, -1), pages


def until_stop(kept: Kept, sampling: SamplingRows) -> Kept:
    """Up to the first stop id."""
    index = jnp.arange(kept.tokens.shape[1])
    stops = jnp.any(kept.tokens[:, :, None] == sampling.stop_ids[:, None], axis=-1) & (index < kept.count[:, None])
    first = jnp.min(jnp.where(stops, index, kept.tokens.shape[1]), axis=1)
    count = jnp.minimum(kept.count, first + 1)
    return Kept(jnp.where(index < count[:, None], kept.tokens, -1), count)


def pack(logits: jax.Array, kept: Kept, form: SamplerForm, scored: jax.Array) -> jax.Array:
    """i32[R, X + 1, result_width(form)]; with log-probabilities where `scored` bool[]."""
    if form is not SamplerForm.FULL:
        return kept.tokens[..., None]
    num_rows, width, vocab_size = logits.shape
    scores = steps.scores_if(scored, logits.reshape(-1, vocab_size), jnp.maximum(kept.tokens, 0).reshape(-1))
    return jnp.concatenate([kept.tokens[..., None], scores.reshape(num_rows, width, -1)], axis=-1)
