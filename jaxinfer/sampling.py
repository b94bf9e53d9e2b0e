"""Logits to tokens on the device, in three forms; raw log-probabilities.

The sampled token is argmax(log p + noise) (`noise.py`), so it depends on the request alone, never on the batch, and
speculation can share the noise.
Filters are thresholds found by bisection on the floats' bit patterns: no sort of the vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.noise import first_largest, first_largest_with_noise
from jaxinfer.types import MASK_BITS, MAX_LOGPROBS, SamplerForm
from pallas_kernels.dispatch import current_device

TOP_K_ROWS = 8
"""See `likeliest`."""


class SamplingRows(NamedTuple):
    """Sampling fields of R rows."""

    key: jax.Array  # u32[R, 2], of `noise.row_keys`
    seeded: jax.Array  # bool[R], the request brought its seed
    temperature: jax.Array  # f32[R], 0 is greedy
    top_k: jax.Array  # i32[R], 0 is off
    top_p: jax.Array  # f32[R]
    min_p: jax.Array  # f32[R]
    min_position: jax.Array  # i32[R], stop ids are banned at positions below
    stop_ids: jax.Array  # i32[R, MAX_STOP_IDS], -1 is none


class Scores(NamedTuple):
    """Raw log-probabilities of R chosen tokens and of the likeliest ones."""

    logprob: jax.Array  # f32[R]
    rank: jax.Array  # i32[R], 1 is the likeliest
    top_ids: jax.Array  # i32[R, MAX_LOGPROBS]
    top_logprobs: jax.Array  # f32[R, MAX_LOGPROBS]


def sample(logits: jax.Array, rows: SamplingRows, positions: jax.Array, form: SamplerForm) -> jax.Array:
    """Tokens i32[R] from logits f32[R, V] for the tokens at positions i32[R]; `form` is static."""
    if form is SamplerForm.GREEDY:
        return first_largest(logits)
    wanted = distribution(logits, rows, positions, form)
    return first_largest_with_noise(wanted, rows.temperature == 0.0, rows.key, positions)


def distribution(logits: jax.Array, rows: SamplingRows, positions: jax.Array, form: SamplerForm) -> jax.Array:
    """What is sampled from: unnormalised log-probabilities f32[R, V], -inf where a filter forbids the token.

    Rows of temperature 0 keep their order. Not for the GREEDY form.
    """
    if form is SamplerForm.FULL:
        logits = ban_stop_ids(logits, rows, positions)
    scaled = logits / jnp.where(rows.temperature == 0.0, 1.0, rows.temperature)[:, None]
    return jnp.where(scaled >= filter_threshold(scaled, rows)[:, None], scaled, -jnp.inf)


def legal(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Logits f32[R, V] with -inf at ids whose bit is not set in i32[R, mask_width(V)]."""
    bits = (masks[..., None] >> jnp.arange(MASK_BITS)) & 1
    allowed = bits.reshape(*masks.shape[:-1], -1)[..., :logits.shape[-1]]
    return jnp.where(allowed > 0, logits, -jnp.inf)


def ban_stop_ids(logits: jax.Array, rows: SamplingRows, positions: jax.Array) -> jax.Array:
    """Logits with the stop ids of rows still under their minimum length at -inf."""
    vocab_size = logits.shape[-1]
    young = (positions < rows.min_position)[:, None]
    ids = jnp.where(young & (rows.stop_ids >= 0), rows.stop_ids, vocab_size)
    row = jnp.arange(logits.shape[0])[:, None]
    return logits.at[row, ids].set(-jnp.inf, mode="drop")


def filter_threshold(scaled: jax.Array, rows: SamplingRows) -> jax.Array:
    """Smallest kept value f32[R] of temperature-scaled logits f32[R, V].

    Order as in vLLM: min-p and top-k on the whole distribution, then top-p on what they left. Ties stay.
    """
    largest = jnp.max(scaled, axis=-1)
    min_p = jnp.where(rows.min_p > 0, largest + jnp.log(jnp.maximum(rows.min_p, 1e-30)), -jnp.inf)
    top_k = _when_any(rows.top_k > 0, lambda: _top_k_threshold(scaled, rows.top_k))
    kept = jnp.maximum(min_p, top_k)
    top_p = _when_any(rows.top_p < 1.0, lambda: _top_p_threshold(scaled, kept, largest, rows.top_p))
    return jnp.maximum(kept, top_p)


def _when_any(used: jax.Array, threshold) -> jax.Array:
    """`threshold()` where the row uses the filter; not computed at all when no row does."""
    off = jnp.full(used.shape, -jnp.inf, jnp.float32)
    return jax.lax.cond(jnp.any(used), lambda: jnp.where(used, threshold(), off), lambda: off)


def _top_k_threshold(scaled: jax.Array, top_k: jax.Array) -> jax.Array:
    ones = jnp.ones_like(scaled)
    return _largest_with_mass(scaled, ones, jnp.clip(top_k, 1, scaled.shape[-1]).astype(jnp.float32))


def _top_p_threshold(scaled: jax.Array, kept: jax.Array, largest: jax.Array, top_p: jax.Array) -> jax.Array:
    mass = jnp.where(scaled >= kept[:, None], jnp.exp(scaled - largest[:, None]), 0.0)
    return _largest_with_mass(scaled, mass, top_p * jnp.sum(mass, axis=-1))


def _largest_with_mass(values: jax.Array, mass: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest threshold t[R] whose values >= t hold at least `wanted` f32[R] of `mass` f32[R, V].

    Bisection over the 32 bits of an order-preserving integer form of the floats, so it is exact.
    """
    ordered = _to_ordered(values)

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.sum(jnp.where(ordered >= middle[:, None], mass, 0.0), axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.min(ordered, axis=-1)
    high = jnp.max(ordered, axis=-1) + 1
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return _from_ordered(low)


def _to_ordered(values: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(ordered: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(ordered ^ ((ordered >> 31) & 0x7FFFFFFF), jnp.float32)


def score(logits: jax.Array, chosen: jax.Array) -> Scores:
    """Raw scores of `chosen` i32[R] under logits f32[R, V]: before temperature, as users of logprobs expect."""
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, chosen[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > picked, axis=-1, dtype=jnp.int32)
    top, ids = likeliest(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return Scores((picked - normaliser)[:, 0], rank, ids.astype(jnp.int32), top - normaliser)


def likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of f32[R, V] in falling order, f32[R, count], and their indices i32[R, count].

    On TPUs a few rows at a time: XLA's code grows with the rows, and 64 of 128,256 compile for 2.6 s of a core, 8 for
    0.3 s (v6e, libtpu 0.0.48, two cores of a Xeon, 2026-11-28).
    """
    top_k = partial(jax.lax.top_k, k=count)
    if current_device().platform == "tpu" and logits.shape[0] > TOP_K_ROWS:
        return jax.lax.map(top_k, logits, batch_size=TOP_K_ROWS)
    return top_k(logits)
