"""Gumbel noise of sampling: a token is the largest of log p + noise, and the noise is a function of the request alone.

Key of a token: fold_in(fold_in(seed, sample index), position); of each `CHUNK` of the vocabulary: fold_in(that, chunk).
"""

import enum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import current_device

KEY_IMPL = "threefry2x32"
"""Stated, not the process default: the same seed must give the same tokens on every back end."""
CHUNK = 16_384
"""Ids of the vocabulary that share a key."""


def row_keys(seed_words: jax.Array, sample_index: jax.Array) -> jax.Array:
    """Keys u32[R, 2] of rows from seeds u32[R, 2] (high, low word) and sample indices i32[R]."""
    fold = jax.vmap(lambda words, index: jax.random.fold_in(jax.random.wrap_key_data(words, impl=KEY_IMPL), index))
    return jax.random.key_data(fold(seed_words, sample_index))


class Use(enum.IntEnum):
    """What speculation draws for, apart from the sampled tokens."""

    DRAFT = 1
    ACCEPTANCE = 2
    RECOVERY = 3


def keys_for(use: Use, keys: jax.Array) -> jax.Array:
    """Keys u32[R, 2] of a stream that shares nothing with that of the sampled tokens: no position is so large."""
    data = np.uint32(2**32 - use)
    fold = jax.vmap(lambda words: jax.random.fold_in(jax.random.wrap_key_data(words, impl=KEY_IMPL), data))
    return jax.random.key_data(fold(keys))


def uniform(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """f32[R] in [0, 1) for keys u32[R, 2] at positions i32[R]."""
    def one(words, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(words, impl=KEY_IMPL), position))

    return jax.vmap(one)(keys, positions)


def gumbel(keys: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Noise f32[R, V] for keys u32[R, 2] at positions i32[R]."""
    sizes = [min(CHUNK, vocab_size - first) for first in range(0, vocab_size, CHUNK)]
    chunks = chunk_keys(keys, positions, len(sizes))
    return jnp.concatenate([chunk_noise(chunk, size) for chunk, size in zip(chunks, sizes, strict=True)], axis=1)


def chunk_keys(keys: jax.Array, positions: jax.Array, count: int) -> jax.Array:
    """Keys u32[count, R, 2] of the first chunks."""
    def one(words, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl=KEY_IMPL), position)
        return jax.random.key_data(jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count)))

    return jax.vmap(one, out_axes=1)(keys, positions)


def chunk_noise(keys: jax.Array, size: int) -> jax.Array:
    """Noise f32[R, size] of one chunk with keys u32[R, 2]. A shorter chunk is the beginning of a longer one."""
    def one(words):
        return jax.random.gumbel(jax.random.wrap_key_data(words, impl=KEY_IMPL), (size,), jnp.float32)

    return jax.vmap(one)(keys)


def first_largest(values: jax.Array) -> jax.Array:
    """Index i32[R] of the first largest of f32[R, V]; the last index when there is none (NaN).

    Two plain reductions: XLA:CPU vectorises them, unlike the reduction of pairs that argmax is (0.6 ms for 64 x 4096).
    """
    return largest_and_first(values)[1]


def largest_and_first(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest f32[R] of f32[R, V], and its first index i32[R]."""
    ids = jnp.arange(values.shape[-1], dtype=jnp.int32)
    largest = jnp.max(values, axis=-1)
    return largest, jnp.min(jnp.where(values == largest[:, None], ids, values.shape[-1] - 1), axis=-1)


def first_largest_with_noise(values: jax.Array, noiseless: jax.Array, keys: jax.Array, positions: jax.Array
                             ) -> jax.Array:
    """Index i32[R] of the first largest of f32[R, V] plus the rows' noise; none in `noiseless` bool[R] rows.

    keys: u32[R, 2]. positions: i32[R].
    """
    if current_device().platform == "tpu":
        return largest_by_chunks(values, noiseless, keys, positions)
    noise = jnp.where(noiseless[:, None], 0.0, gumbel(keys, positions, values.shape[-1]))
    return first_largest(values + noise)


def largest_by_chunks(values: jax.Array, noiseless: jax.Array, keys: jax.Array, positions: jax.Array) -> jax.Array:
    """`first_largest_with_noise`, a chunk after the other.

    XLA:TPU keeps the noise of all ids in VMEM and then unrolls all of its computation: 63,000 bundles of code for 16
    rows of 128,256, which take 13 s of a core to compile in every program; by chunks 1 s, and no more cycles (v6e,
    libtpu 0.0.48, two cores of a Xeon, 2026-11-28).
    """
    num_rows, vocab_size = values.shape
    whole, rest = divmod(vocab_size, CHUNK)
    chunks = chunk_keys(keys, positions, whole + (rest > 0))

    def visit(best, index, size):
        largest, at = best
        part = jax.lax.dynamic_slice_in_dim(values, index * CHUNK, size, axis=1)
        noise = chunk_noise(chunks[index], size)
        mine, first = largest_and_first(part + jnp.where(noiseless[:, None], 0.0, noise))
        at = jnp.where(mine > largest, first + index * CHUNK, at)
        return jnp.maximum(mine, largest), at

    best = jnp.full(num_rows, -jnp.inf, jnp.float32), jnp.zeros(num_rows, jnp.int32)
    if whole:
        best = jax.lax.fori_loop(0, whole, lambda index, best: visit(best, index, CHUNK), best)
    largest, at = visit(best, whole, rest) if rest else best
    return jnp.where(jnp.isnan(largest), vocab_size - 1, at)
