"""Draft, verify, accept and sample in one program: rounds fused like those of a decode step, nothing comes to the host.

In a round the drafter (`drafter.Drafter`) proposes up to X tokens a row, and the target computes the row's last token
and all proposals at once. Rejected ones cost no copy: the row's length does not grow over them, and the next round
writes over their keys and values.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import row_state, rule_table, steps
from jaxinfer.acceptance import Drafted, Kept, accept
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.drafter import Prefilled, Round, Told, Wanted
from jaxinfer.finite import NOT_FINITE, are_finite
from jaxinfer.layout import PrefillLayout, ProposalLayout, SpeculateFields, SpeculateLayout, result_width
from jaxinfer.model import Rows
from jaxinfer.row_state import RowState
from jaxinfer.sampling import SamplingRows, legal
from jaxinfer.steps import DeviceState, Unsampled
from jaxinfer.types import SamplerForm

REFUSED = -2
"""In results, where a proposal was made and not kept; the host counts them. All ids below 0 are no tokens."""


def prefill_step(pair: DraftPair, layout: PrefillLayout, params: Pair, state: DeviceState, inputs: jax.Array
                 ) -> tuple[DeviceState, Unsampled, jax.Array]:
    """`steps.prefill_step` of the target, which the drafter sees."""
    state, unsampled, hidden = steps.prefill_step(pair, layout, params, state, inputs)
    fields, (pages, draft) = layout.unpack(inputs), state.kv_pages
    packed = steps.pack_rows(state.rows, fields)
    decodes = fields.on_device & (packed.rows.kv_lens > 0)
    seen = Prefilled(packed.tokens, packed.positions, packed.rows, fields.slots, decodes, hidden)

    def observed(draft):
        return pair.drafter.observe_prefill(params, draft, state.rows, seen)

    if pair.drafter.prompts_cost:
        draft = jax.lax.cond(fields.watched, observed, lambda draft: draft, draft)
    else:
        draft = observed(draft)
    return DeviceState(Pair(pages, draft), state.rows), unsampled, hidden


def catch_up(pair: DraftPair, params: Pair, state: DeviceState, inputs: jax.Array) -> DeviceState:
    """The state after `Drafter.catch_up`. inputs: i32[2 + n + M], slot, first position, tokens, pages."""
    (pages, draft), behind = state.kv_pages, 2 + pair.drafter.num_caught_up
    draft = pair.drafter.catch_up(params, draft, Told(inputs[0], inputs[1], inputs[2:behind], inputs[behind:]))
    return DeviceState(Pair(pages, draft), state.rows)


def enter_proposals(pair: DraftPair, layout: ProposalLayout, state: DeviceState, inputs: jax.Array) -> DeviceState:
    """The state after `Drafter.enter_proposals`. inputs: i32[n, layout.size]."""
    pages, draft = state.kv_pages
    draft = pair.drafter.enter_proposals(draft, *layout.unpack(inputs))
    return DeviceState(Pair(pages, draft), state.rows)


def speculate_step(pair: DraftPair, layout: SpeculateLayout, form: SamplerForm, params: Pair, state: DeviceState,
                   inputs: jax.Array) -> tuple[DeviceState, jax.Array]:
    """Up to `layout.max_rounds` rounds of R rows, ended early when every row has stopped.

    inputs: i32[layout.size]. Returns the state and the results i32[max_rounds, R, X + 1, result_width(form)], -1 where
    a row has no token, REFUSED where it had a proposal, NOT_FINITE where it broke.
    """
    fields = layout.unpack(inputs)
    rows = row_state.append_pages(state.rows, fields.new_pages)
    page_indices = rows.page_table.at[fields.slots].get(mode="clip")
    shape = (layout.max_rounds, layout.num_rows, layout.num_drafted + 1, result_width(form))

    def plain(state):
        return plain_round(pair, form, params, state, fields, page_indices)

    def drafting(state):
        wanted = wanted_of(state.rows, fields)
        state, drafted = propose(pair, form, params, state, wanted)
        if not pair.drafter.may_decline:
            return verifying_round(pair, form, params, state, drafted, wanted)
        return jax.lax.cond(
            jnp.any(drafted.count > 0),
            lambda state: verifying_round(pair, form, params, state, drafted, wanted), plain, state)  # fmt: skip

    def any_wanted(state):
        return jnp.any(wanted_of(state.rows, fields).count > 0)

    rounds = steps.no_rounds(DeviceState(state.kv_pages, rows), shape)
    if pair.drafter.may_decline:
        rounds = steps.run_rounds(rounds, drafting, fields)
    else:  # a row that wants no proposals wants none later in the step; a cond in each round took 2 % of plain ones
        rounds = steps.run_rounds(steps.run_rounds(rounds, drafting, fields, any_wanted), plain, fields)
    return rounds.state, rounds.results


def propose(pair: DraftPair, form: SamplerForm, params: Pair, state: DeviceState, wanted: Wanted
            ) -> tuple[DeviceState, Drafted]:
    pages, draft = state.kv_pages
    drafted, draft = pair.drafter.propose(form, params, draft, state.rows, wanted)
    return DeviceState(Pair(pages, draft), state.rows), drafted


def plain_round(pair: DraftPair, form: SamplerForm, params: Pair, state: DeviceState, fields: SpeculateFields,
                page_indices: jax.Array) -> tuple[DeviceState, jax.Array]:
    """The target's token for each row."""
    alive = row_state.alive(state.rows, fields.slots, fields.present)
    after, result, hidden = steps.decode_round(pair, form, params, state, fields, page_indices)
    seen = Round(fields.slots, alive, page_indices, result[:, :1], alive.astype(jnp.int32), hidden[:, None])
    padded = jnp.pad(result[:, None], ((0, 0), (0, pair.drafter.num_drafted), (0, 0)), constant_values=-1)
    return observe(pair, params, after, state.rows, seen), padded


def propose_step(pair: DraftPair, layout: SpeculateLayout, params: Pair, state: DeviceState, inputs: jax.Array
                 ) -> tuple[DeviceState, Drafted]:
    """The proposals of a round; the host asks its rows' grammars before `verify_step`. inputs: i32[layout.size]."""
    fields = layout.unpack(inputs)
    rows = row_state.append_pages(state.rows, fields.new_pages)
    wanted = wanted_of(rows, fields)
    state, drafted = propose(pair, SamplerForm.FULL, params, DeviceState(state.kv_pages, rows), wanted)
    return state, drafted._replace(tokens=jnp.where(jnp.arange(drafted.tokens.shape[1]) < drafted.count[:, None],
                                                    drafted.tokens, -1))


def verify_step(pair: DraftPair, layout: SpeculateLayout, params: Pair, state: DeviceState, inputs: jax.Array,
                drafted: Drafted, masks: jax.Array) -> tuple[DeviceState, jax.Array]:
    """The rest of that round. inputs: those of `propose_step`. masks: i32[R, X + 1, mask_width(V)], before each
    proposal and behind the last. Returns the state and the results i32[1, R, X + 1, result_width(FULL)].
    """
    wanted = wanted_of(state.rows, layout.unpack(inputs))
    drafted = drafted._replace(tokens=jnp.maximum(drafted.tokens, 0))
    state, result = verifying_round(pair, SamplerForm.FULL, params, state, drafted, wanted, masks)
    return state, result[None]


def wanted_of(rows: RowState, fields: SpeculateFields) -> Wanted:
    slots = fields.slots
    alive = row_state.alive(rows, slots, fields.present)
    # Positions behind the row's last token have no pages.
    left = rows.tokens_left.at[slots].get(mode="clip")
    count = jnp.where(alive, jnp.minimum(fields.num_drafted, left - 1), 0)
    return Wanted(slots, alive, count, rows.page_table.at[slots].get(mode="clip"), row_state.sampling_of(rows, slots))


def verifying_round(pair: DraftPair, form: SamplerForm, params: Pair, state: DeviceState, drafted: Drafted,
                    wanted: Wanted, masks: jax.Array | None = None) -> tuple[DeviceState, jax.Array]:
    """The proposals that the target keeps, and one token more. masks: of `verify_step`."""
    rows, num_rows = state.rows, wanted.slots.shape[0]
    # Where a program has more rows than there are slots, those behind are empty: their tokens would double the work.
    most = min(num_rows, rows.kv_len.shape[0] - 1)
    drafted, wanted, masks = jax.tree.map(lambda field: field[:most], (drafted, wanted, masks))
    slots, alive, sampling = wanted.slots, wanted.alive, wanted.sampling
    logits, hidden, pages = verify(pair, params, state.kv_pages, rows, slots, alive, drafted, wanted.page_indices)
    positions = rows.kv_len.at[slots].get(mode="clip") + 1
    ruled = logits if masks is None else legal(logits, masks)
    if form is SamplerForm.FULL:
        ruled = rule_table.apply_along(rows.rules, slots, ruled, drafted.tokens)
    kept = until_stop(accept(ruled, drafted, sampling, positions, form), sampling)
    kept = Kept(jnp.where(alive[:, None], kept.tokens, -1), jnp.where(alive, kept.count, 0))
    kept, broken = until_broken(kept, logits)
    scored = row_state.any_scored(rows, slots, alive)
    after = row_state.stop(row_state.advance_many(rows, slots, alive, kept.tokens, kept.count), slots, broken)
    if form is SamplerForm.FULL:
        after = row_state.record(after, slots, kept.tokens, kept.count)
    seen = Round(slots, alive, wanted.page_indices, kept.tokens, kept.count, hidden)
    result = pack(logits, kept, drafted, broken, form, scored)
    padded = jnp.pad(result, ((0, num_rows - most), (0, 0), (0, 0)), constant_values=-1)
    return observe(pair, params, DeviceState(pages, after), rows, seen), padded


def observe(pair: DraftPair, params: Pair, state: DeviceState, before: RowState, seen: Round) -> DeviceState:
    """The state after a round that the drafter has seen. before: the rows before it."""
    pages, draft = state.kv_pages
    return DeviceState(Pair(pages, pair.drafter.observe_round(params, draft, before, seen)), state.rows)


def verify(pair: DraftPair, params: Any, pages: Any, rows: RowState, slots: jax.Array, alive: jax.Array,
           drafted: Drafted, page_indices: jax.Array) -> tuple[jax.Array, jax.Array, Any]:  # fmt: skip
    """The target's logits f32[R, X + 1, V] before each proposal and behind the last, the hidden states [R, X + 1, D]
    that they come from, and the pages.

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
    hidden, pages = pair.forward(
        params, padded[row, offset], kv_len[row] + offset, pages,
        Rows(jnp.where(alive, kv_len + q_lens, 0), page_indices, cu_q_lens, few), max_q_len=width)  # fmt: skip
    at = jnp.minimum(cu_q_lens[:-1, None] + jnp.arange(width), num_rows * width - 1)
    hidden = hidden[at.reshape(-1)]
    logits = pair.logits(params, hidden)
    return logits.reshape(num_rows, width, -1), hidden.reshape(num_rows, width, -1), pages


def until_stop(kept: Kept, sampling: SamplingRows) -> Kept:
    """Up to the first stop id."""
    index = jnp.arange(kept.tokens.shape[1])
    stops = jnp.any(kept.tokens[:, :, None] == sampling.stop_ids[:, None], axis=-1) & (index < kept.count[:, None])
    first = jnp.min(jnp.where(stops, index, kept.tokens.shape[1]), axis=1)
    count = jnp.minimum(kept.count, first + 1)
    return Kept(jnp.where(index < count[:, None], kept.tokens, -1), count)


def until_broken(kept: Kept, logits: jax.Array) -> tuple[Kept, jax.Array]:
    """Up to the first token that logits f32[R, X + 1, V] decided which are not finite, and where there is one: bool[R].
    """
    index = jnp.arange(kept.tokens.shape[1])
    broken = ~are_finite(logits) & (index < kept.count[:, None])
    first = jnp.min(jnp.where(broken, index, kept.tokens.shape[1]), axis=1)
    count = jnp.minimum(kept.count, first)
    return Kept(jnp.where(index < count[:, None], kept.tokens, -1), count), jnp.any(broken, axis=1)


def pack(logits: jax.Array, kept: Kept, drafted: Drafted, broken: jax.Array, form: SamplerForm, scored: jax.Array
         ) -> jax.Array:
    """i32[R, X + 1, result_width(form)]; with log-probabilities where `scored` bool[]. In `broken` bool[R] rows
    NOT_FINITE is behind the last token.
    """
    index = jnp.arange(kept.tokens.shape[1])
    refused = (index >= kept.count[:, None]) & (index <= drafted.count[:, None]) & (kept.count[:, None] > 0)
    ids = jnp.where(broken[:, None] & (index == kept.count[:, None]), NOT_FINITE,
                    jnp.where(refused, REFUSED, kept.tokens))[..., None]
    if form is not SamplerForm.FULL:
        return ids
    num_rows, width, vocab_size = logits.shape
    scores = steps.scores_if(scored, logits.reshape(-1, vocab_size), jnp.maximum(kept.tokens, 0).reshape(-1))
    return jnp.concatenate([ids, scores.reshape(num_rows, width, -1)], axis=-1)
