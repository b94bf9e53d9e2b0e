"""Noise: the same by chunks as at once, the same in every batch, Gumbel-distributed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import noise

ROWS = 3


def keys(seed: int = 0, rows: int = ROWS) -> jax.Array:
    words = jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.full(rows, seed, jnp.uint32)], axis=1)
    return noise.row_keys(words, jnp.arange(rows, dtype=jnp.int32))


def both(values: jax.Array, noiseless: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """By chunks, and at once."""
    arguments = (values, jnp.array(noiseless), keys(), jnp.arange(ROWS, dtype=jnp.int32))
    return tuple(np.asarray(jax.jit(form)(*arguments))
                 for form in (noise.largest_by_chunks, noise.first_largest_with_noise))  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "CHUNK", 8)
    jax.clear_caches()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("vocab_size", [1, 7, 8, 9, 16, 29])
@pytest.mark.parametrize("noiseless", [[False] * ROWS, [True, False, True]])
def test_chunks_give_what_the_whole_gives(vocab_size, noiseless):
    rng = np.random.default_rng(vocab_size)
    for _ in range(5):
        by_chunks, at_once = both(jnp.asarray(rng.normal(size=(ROWS, vocab_size)), jnp.float32), noiseless)
        np.testing.assert_array_equal(by_chunks, at_once)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("special", [-np.inf, np.nan])
@pytest.mark.parametrize("where", [slice(0, 20), slice(3, 4), slice(19, 20), slice(8, 16)])
def test_chunks_agree_where_values_are_missing(special, where):
    values = np.random.default_rng(1).normal(size=(ROWS, 20)).astype(np.float32)
    values[:, where] = special
    by_chunks, at_once = both(jnp.asarray(values), [True, False, False])
    np.testing.assert_array_equal(by_chunks, at_once)


@pytest.mark.usefixtures("small_chunks")
def test_ties_go_to_the_first_of_all_chunks():
    by_chunks, at_once = both(jnp.zeros((ROWS, 21)).at[:, jnp.array([5, 13, 20])].set(2.0), [True] * ROWS)
    assert by_chunks.tolist() == at_once.tolist() == [5] * ROWS


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_shorter_vocabulary_has_the_beginning_of_the_noise(one, other):
    positions = jnp.full(ROWS, 5, jnp.int32)
    short, long = (noise.gumbel(keys(), positions, size) for size in sorted((one, other)))
    np.testing.assert_array_equal(short, long[:, :short.shape[1]])


def test_noise_is_gumbel_across_chunks():
    """Kolmogorov-Smirnov distance to exp(-exp(-x)) of 3 x 40,000 values; 1.95 / sqrt(n) is the 0.999 quantile."""
    values = np.sort(np.asarray(noise.gumbel(keys(3), jnp.full(ROWS, 9, jnp.int32), 40_000)).ravel())
    expected = np.exp(-np.exp(-values.astype(np.float64)))
    distance = np.max(np.abs(expected - (np.arange(len(values)) + 0.5) / len(values)))
    assert distance < 1.95 / np.sqrt(len(values))


def test_chunks_differ_from_each_other():
    values = np.asarray(noise.gumbel(keys(), jnp.zeros(ROWS, jnp.int32), 2 * noise.CHUNK))
    assert not np.intersect1d(values[0, :noise.CHUNK], values[0, noise.CHUNK:]).size > noise.CHUNK // 100
