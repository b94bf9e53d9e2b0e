"""The compiled units: prefill, sampling behind it, decode, scoring. Arrays in, arrays out; pages and row state donated.

Host inputs arrive as one flat i32 array a step (`layout.py` says what lies where) and the results leave as one,
since every array that crosses costs a transfer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import row_state, rule_table, sampling
from jaxinfer.finite import NOT_FINITE, are_finite, broken_rows
from jaxinfer.layout import DecodeLayout, PrefillLayout, RulesLayout, result_width
from jaxinfer.model import Model, Rows
from jaxinfer.row_state import RowState
from jaxinfer.types import SamplerForm

SCORE_CHUNK = 128
"""Most tokens scored at once: bounds the logits in memory to [128, V]."""


class DeviceState(NamedTuple):
    """Everything a step donates and returns."""

    kv_pages: Any  # [L, P, ...]
    rows: RowState


class Unsampled(NamedTuple):
    """What a prefill step leaves for `sample_step`, row by row."""

    hidden: jax.Array  # [R, D], of each row's last token
    tokens: jax.Array  # i32[R], that token
    slots: jax.Array  # i32[R]
    kv_lens: jax.Array  # i32[R], in the pages after the step; 0 where the row computed nothing
    samples: jax.Array  # bool[R]
    broken: jax.Array  # bool[R], computed something that is not finite
    form: jax.Array  # i32[], a SamplerForm


def prefill_step(model: Model, layout: PrefillLayout, params: Any, state: DeviceState, inputs: jax.Array
                 ) -> tuple[DeviceState, Unsampled, jax.Array]:
    """Any ragged mix of prompt chunks and single decode tokens, all but sampling.

    inputs: i32[layout.size]. Returns the state, what `sample_step` needs and the hidden states [T, D] (for scoring; an
    unused result costs nothing but its bytes).
    """
    fields = layout.unpack(inputs)
    rows = row_state.append_pages(row_state.initialise(state.rows, fields.inits), fields.new_pages)
    packed = pack_rows(rows, fields)
    hidden, kv_pages = model.forward(params, packed.tokens, packed.positions, state.kv_pages, packed.rows,
                                     max_q_len=None)
    last = jnp.clip(packed.rows.cu_q_lens[1:] - 1, 0)
    kv_lens = packed.rows.kv_lens
    computed = kv_lens > 0
    broken = computed & broken_rows(hidden, packed.rows.cu_q_lens)
    unsampled = Unsampled(hidden[last], packed.tokens[last], fields.slots, kv_lens, fields.samples & computed, broken,
                          fields.form)
    return DeviceState(kv_pages, rows), unsampled, hidden


def sample_step(model: Model, params: Any, rows: RowState, unsampled: Unsampled, masks: jax.Array | None = None
                ) -> tuple[RowState, jax.Array]:
    """The tokens after a prefill step: one program behind all of its buckets, as the samplers take long to compile.

    masks: i32[R, mask_width(V)] of what each row's grammar allows. Returns the rows and the packed results
    i32[R, result_width(FULL)]; -1 in rows that sample nothing, NOT_FINITE in broken ones.
    """
    logits = model.logits(params, unsampled.hidden)
    slots, kv_lens, samples = unsampled.slots, unsampled.kv_lens, unsampled.samples
    broken = unsampled.broken | (samples & ~are_finite(logits))
    tokens, scores = _sample_any_form(logits, rows, slots, kv_lens, samples, unsampled.form, masks)
    result = jnp.concatenate([shown(tokens, samples, broken), scores], axis=1)
    rows = row_state.record(rows, slots, tokens[:, None], samples.astype(jnp.int32))
    rows = row_state.advance(rows, slots, samples, kv_lens, unsampled.tokens, tokens)
    return row_state.stop(rows, slots, broken), result


def shown(tokens: jax.Array, sampled: jax.Array, broken: jax.Array) -> jax.Array:
    """The first column i32[R, 1] of packed results from tokens i32[R] of the rows that `sampled` bool[R]."""
    return jnp.where(broken, NOT_FINITE, jnp.where(sampled, tokens, -1))[:, None]


class PackedRows(NamedTuple):
    tokens: jax.Array  # i32[T]
    positions: jax.Array  # i32[T]
    rows: Rows


def pack_rows(state: RowState, fields) -> PackedRows:
    """Fills in what only the device knows: lengths and last tokens of rows that decode."""
    num_tokens = fields.tokens.shape[0]
    alive = ~(fields.on_device & state.stopped.at[fields.slots].get(mode="clip"))
    device_lens = state.kv_len.at[fields.slots].get(mode="clip") + 1
    kv_lens = jnp.where(fields.on_device, device_lens, fields.ends)
    kv_lens = jnp.where(alive & (fields.q_lens > 0), kv_lens, 0)
    cu_q_lens = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(fields.q_lens, dtype=jnp.int32)])
    row = jnp.repeat(jnp.arange(fields.q_lens.shape[0]), fields.q_lens, total_repeat_length=num_tokens)
    offset = jnp.arange(num_tokens, dtype=jnp.int32) - cu_q_lens[row]
    positions = jnp.maximum(kv_lens[row] - fields.q_lens[row] + offset, 0)
    last_token = state.last_token.at[fields.slots].get(mode="clip")
    tokens = jnp.where(fields.on_device[row], last_token[row], fields.tokens)
    page_indices = state.page_table.at[fields.slots].get(mode="clip")
    return PackedRows(tokens, positions, Rows(kv_lens, page_indices, cu_q_lens, fields.distribution))


def _sample_any_form(logits, rows: RowState, slots, positions, sampled, form, masks):
    """Tokens i32[R] and their packed scores, sampled with the form chosen at run time: a step that prefills is long,
    the choice is cheap.

    What FULL does beyond SIMPLE changes no row that did not ask for it, and each part compiles for seconds, so both
    share one branch; only scores are apart.
    """
    fields = row_state.sampling_of(rows, slots)
    legal = logits if masks is None else sampling.legal(logits, masks)
    tokens = jax.lax.cond(
        form == SamplerForm.GREEDY,
        lambda: sampling.sample(legal, fields, positions, SamplerForm.GREEDY),
        lambda: sampling.sample(under_rules(legal, rows, slots), fields, positions, SamplerForm.FULL))
    return tokens, scores_if(row_state.any_scored(rows, slots, sampled), logits, tokens)


def _sample_rows(logits, rows: RowState, slots, positions, sampled, broken, form: SamplerForm):
    """Tokens i32[R] for `positions` and the packed results i32[R, result_width(form)]; -1 in rows that sample nothing,
    NOT_FINITE in broken ones.
    """
    fields = row_state.sampling_of(rows, slots)
    wanted = under_rules(logits, rows, slots) if form is SamplerForm.FULL else logits
    tokens = sampling.sample(wanted, fields, positions, form)
    first = shown(tokens, sampled, broken)
    if form is not SamplerForm.FULL:
        return tokens, first
    scores = scores_if(row_state.any_scored(rows, slots, sampled), logits, tokens)
    return tokens, jnp.concatenate([first, scores], axis=1)


def under_rules(logits: jax.Array, rows: RowState, slots: jax.Array) -> jax.Array:
    """Logits f32[R, V] under the token rules of the rows at `slots` i32[R], behind the tokens that are recorded."""
    none = jnp.zeros((slots.shape[0], 0), jnp.int32)
    return rule_table.apply(rows.rules, slots, logits, none, jnp.int32(0))


def scores_if(wanted: jax.Array, logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """`pack_scores` of tokens i32[R] under logits f32[R, V], which take a while; zeros unless `wanted` bool[]."""
    width = result_width(SamplerForm.FULL) - 1
    return jax.lax.cond(wanted, lambda: pack_scores(sampling.score(logits, tokens)),
                        lambda: jnp.zeros((tokens.shape[0], width), jnp.int32))


def pack_scores(scores: sampling.Scores) -> jax.Array:
    """i32[R, result_width(FULL) - 1]: log-probability bits, rank, ids and their log-probability bits."""
    def bits(values):
        return jax.lax.bitcast_convert_type(values, jnp.int32)

    missing = (result_width(SamplerForm.FULL) - 3) // 2 - scores.top_ids.shape[1]
    pad = ((0, 0), (0, missing))
    return jnp.concatenate([
        bits(scores.logprob)[:, None], scores.rank[:, None],
        jnp.pad(scores.top_ids, pad, constant_values=-1), jnp.pad(bits(scores.top_logprobs), pad)], axis=1)


def decode_step(model: Model, layout: DecodeLayout, form: SamplerForm, params: Any, state: DeviceState,
                inputs: jax.Array) -> tuple[DeviceState, jax.Array]:
    """Up to `layout.max_rounds` decode rounds of R rows, ended early when every row has stopped.

    inputs: i32[layout.size]. Returns the state and the results i32[max_rounds, R, result_width(form)], -1 where a
    row had stopped or the round did not run.
    """
    fields = layout.unpack(inputs)
    rows = row_state.append_pages(state.rows, fields.new_pages)
    page_indices = rows.page_table.at[fields.slots].get(mode="clip")
    shape = (layout.max_rounds, layout.num_rows, result_width(form))

    def one_round(state):
        return decode_round(model, form, params, state, fields, page_indices)[:2]

    _, state, results = run_rounds(no_rounds(DeviceState(state.kv_pages, rows), shape), one_round, fields)
    return state, results


class Rounds(NamedTuple):
    """How many rounds of a step have run, the state behind them, and their results, -1 where none ran."""

    count: jax.Array
    state: DeviceState
    results: jax.Array


def no_rounds(state: DeviceState, shape: tuple[int, ...]) -> Rounds:
    """Before the first. shape: of the results, the most rounds first."""
    return Rounds(jnp.int32(0), state, jnp.full(shape, -1, jnp.int32))


def run_rounds(rounds: Rounds, one_round: Callable[[DeviceState], tuple[DeviceState, jax.Array]], fields: Any,
               is_wanted: Callable[[DeviceState], jax.Array | bool] = lambda state: True) -> Rounds:
    """Further rounds until `fields.num_rounds` or until every row has stopped, and only while `is_wanted` bool[]."""
    def going(rounds: Rounds) -> jax.Array:
        alive = row_state.alive(rounds.state.rows, fields.slots, fields.present)
        return (rounds.count < fields.num_rounds) & jnp.any(alive) & is_wanted(rounds.state)

    def next_round(rounds: Rounds) -> Rounds:
        state, result = one_round(rounds.state)
        return Rounds(rounds.count + 1, state, rounds.results.at[rounds.count].set(result))

    return jax.lax.while_loop(going, next_round, rounds)


def decode_round(model, form, params, state: DeviceState, fields, page_indices):
    """One token for each row that runs; the state, the packed results i32[R, result_width(form)] and the hidden states
    [R, D] that the tokens come from.
    """
    rows, slots = state.rows, fields.slots
    alive = row_state.alive(rows, slots, fields.present)
    num_rows = slots.shape[0]
    positions = rows.kv_len.at[slots].get(mode="clip")
    kv_lens = jnp.where(alive, positions + 1, 0)
    every = jnp.full((3,), num_rows, jnp.int32)
    packed = Rows(kv_lens, page_indices, jnp.arange(num_rows + 1, dtype=jnp.int32), every)
    last = rows.last_token.at[slots].get(mode="clip")
    hidden, kv_pages = model.forward(params, last, positions, state.kv_pages, packed, max_q_len=1)
    logits = model.logits(params, hidden)
    broken = alive & ~are_finite(logits)
    tokens, result = _sample_rows(logits, rows, slots, positions + 1, alive, broken, form)
    if form is SamplerForm.FULL:
        rows = row_state.record(rows, slots, tokens[:, None], alive.astype(jnp.int32))
    rows = row_state.stop(row_state.advance(rows, slots, alive, kv_lens, last, tokens), slots, broken)
    return DeviceState(kv_pages, rows), result, hidden


def score_chunk(model: Model, params: Any, hidden: jax.Array, start: jax.Array, targets: jax.Array) -> jax.Array:
    """Raw scores i32[X, result_width(FULL) - 1] of targets i32[X] after hidden [T, D][start:start + X]."""
    chunk = jax.lax.dynamic_slice_in_dim(hidden, start, targets.shape[0])
    return pack_scores(sampling.score(model.logits(params, chunk), targets))


def logits_chunk(model: Model, num_tokens: int, params: Any, hidden: jax.Array, start: jax.Array) -> jax.Array:
    """Logits f32[num_tokens, V] after hidden [T, D][start:start + num_tokens]."""
    return model.logits(params, jax.lax.dynamic_slice_in_dim(hidden, start, num_tokens))


def append_pages(state: DeviceState, new_pages: jax.Array) -> DeviceState:
    """The state with pages (slot, index, page id) i32[X, 3] entered: for plans with more pages than a step carries."""
    return DeviceState(state.kv_pages, row_state.append_pages(state.rows, new_pages))


def enter_rules(layout: RulesLayout, rows: RowState, flat: jax.Array) -> RowState:
    """The rows with the token rules of one that begins, i32[layout.size]."""
    return row_state.enter_rules(rows, *layout.unpack(flat))
