"""The sampler against NumPy references, and against the distribution it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxinfer import sampling
from jaxinfer.noise import row_keys
from jaxinfer.types import MAX_LOGPROBS, MAX_STOP_IDS, SamplerForm
from pallas_kernels.dispatch import Device

VOCAB = 13
ROWS = 4


def make_rows(rows=ROWS, seed=0, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, min_position=0, stop_ids=(),
              seeded=False):
    def full(value, dtype):
        return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))

    words = jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.full(rows, seed, jnp.uint32)], axis=1)
    stops = np.full((rows, MAX_STOP_IDS), -1, np.int32)
    stops[:, :len(stop_ids)] = stop_ids
    return sampling.SamplingRows(
        row_keys(words, jnp.arange(rows, dtype=jnp.int32)), full(seeded, bool), full(temperature, jnp.float32),
        full(top_k, jnp.int32), full(top_p, jnp.float32), full(min_p, jnp.float32), full(min_position, jnp.int32),
        jnp.asarray(stops))


threshold = jax.jit(sampling.filter_threshold)
sample = jax.jit(sampling.sample, static_argnums=3)


def kept_by(logits, **fields):
    rows = make_rows(len(logits), **fields)
    return np.asarray(logits >= np.asarray(threshold(jnp.asarray(logits), rows))[:, None])


# Few distinct values, so that ties are common; float32 steps far above rounding.
logits_arrays = hnp.arrays(
    np.float32, (ROWS, VOCAB), elements=st.sampled_from(np.linspace(-6, 6, 25, dtype=np.float32)))


@given(logits_arrays, st.integers(1, VOCAB + 3))
def test_top_k_keeps_the_k_largest_and_ties(logits, k):
    kth = np.sort(logits, axis=1)[:, -min(k, VOCAB)]
    np.testing.assert_array_equal(kept_by(logits, top_k=k), logits >= kth[:, None])


@given(logits_arrays, st.sampled_from([0.05, 0.3, 0.62, 0.9, 0.97]))
def test_top_p_keeps_the_smallest_sufficient_set(logits, p):
    kept = kept_by(logits, top_p=p)
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(1, keepdims=True)
    for row, mask in zip(probs, kept, strict=True):
        assert row[mask].sum() >= p - 1e-6
        smallest = row[mask].min()
        assert row[row > smallest].sum() < p + 1e-6, "the least likely kept value was not needed"
        assert mask[row >= smallest].all(), "ties stay together"


@given(logits_arrays, st.sampled_from([0.02, 0.25, 0.7, 1.0]))
def test_min_p_is_relative_to_the_likeliest(logits, min_p):
    kept = kept_by(logits, min_p=min_p)
    ratio = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    clear = abs(ratio - min_p) > 1e-5
    np.testing.assert_array_equal(kept[clear], (ratio >= min_p)[clear])


def test_top_p_counts_only_what_top_k_left():
    probs = np.array([[0.4, 0.3, 0.2, 0.1]])
    # Of {0.4, 0.3} the first alone holds 0.4 / 0.7 = 0.57 of the mass.
    kept = kept_by(np.log(probs).astype(np.float32), top_k=2, top_p=0.5)
    np.testing.assert_array_equal(kept, [[True, False, False, False]])


@pytest.mark.parametrize("form", SamplerForm)
def test_the_vocabulary_is_not_sorted(form):
    arguments = jnp.zeros((ROWS, 50_000)), make_rows(top_k=3, top_p=0.5, min_p=0.1), jnp.zeros(ROWS, jnp.int32)
    program = str(jax.make_jaxpr(lambda *arguments: sampling.sample(*arguments, form))(*arguments))
    assert not any(f"{sort}[" in program for sort in ("sort", "top_k", "approx_top_k"))


def test_no_filter_keeps_everything():
    logits = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    assert kept_by(logits).all()


@pytest.mark.smoke
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_samples_follow_the_distribution(temperature):
    """Chi-square over 40,000 draws; the 0.9999 quantile with 12 degrees of freedom is 39.1."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=VOCAB).astype(np.float32) * 1.5
    draws = 40_000
    rows = make_rows(100, temperature=temperature)
    batch = jnp.broadcast_to(jnp.asarray(logits), (100, VOCAB))
    many = jax.jit(jax.vmap(lambda position: sampling.sample(batch, rows, position, SamplerForm.SIMPLE)))
    tokens = many(jnp.broadcast_to(jnp.arange(draws // 100)[:, None], (draws // 100, 100)))
    probs = np.exp(logits.astype(np.float64) / temperature)
    expected = draws * probs / probs.sum()
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=VOCAB)
    assert ((counts - expected) ** 2 / expected).sum() < 39.1


def test_a_row_samples_the_same_whatever_shares_its_batch():
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(size=(ROWS, VOCAB)).astype(np.float32))
    other = logits.at[1:].set(jnp.asarray(rng.normal(size=(ROWS - 1, VOCAB)).astype(np.float32)))
    positions = jnp.arange(ROWS, dtype=jnp.int32) + 7
    first = sample(logits, make_rows(temperature=0.9), positions, SamplerForm.SIMPLE)
    second = sample(other, make_rows(temperature=0.9), positions.at[2].set(99), SamplerForm.SIMPLE)
    assert int(first[0]) == int(second[0])


def test_greedy_rows_ignore_noise_in_every_form():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, VOCAB)).astype(np.float32))
    positions = jnp.zeros(ROWS, jnp.int32)
    for form in SamplerForm:
        tokens = sample(logits, make_rows(temperature=0.0, top_k=3, top_p=0.4), positions, form)
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


def test_keys_differ_by_seed_sample_and_position():
    flat = jnp.zeros((ROWS, 4096), jnp.float32)
    seen = set()
    for seed in (0, 1):
        for position in (5, 6):
            tokens = sample(flat, make_rows(seed=seed), jnp.full(ROWS, position, jnp.int32), SamplerForm.SIMPLE)
            seen.update(int(token) for token in tokens)
    assert len(seen) == 2 * 2 * ROWS


def test_stop_ids_are_banned_below_the_minimum_only():
    logits = jnp.zeros((ROWS, VOCAB)).at[:, 5].set(9.0).at[:, 2].set(4.0)
    rows = make_rows(temperature=0.0, min_position=10, stop_ids=(5, 11))
    tokens = sample(logits, rows, jnp.array([8, 9, 10, 11]), SamplerForm.FULL)
    np.testing.assert_array_equal(tokens, [2, 2, 5, 5])


def test_scores_are_raw_log_softmax():
    logits = np.random.default_rng(4).normal(size=(ROWS, 64)).astype(np.float32) * 3
    chosen = np.array([0, 9, 33, 63], np.int32)
    scores = jax.jit(sampling.score)(jnp.asarray(logits), jnp.asarray(chosen))
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    np.testing.assert_allclose(scores.logprob, exact[np.arange(ROWS), chosen], atol=1e-5)
    order = np.argsort(-exact, axis=1)
    np.testing.assert_array_equal(scores.top_ids, order[:, :MAX_LOGPROBS])
    np.testing.assert_allclose(scores.top_logprobs, np.sort(exact, axis=1)[:, ::-1][:, :MAX_LOGPROBS], atol=1e-5)
    np.testing.assert_array_equal(scores.rank, 1 + (exact > exact[np.arange(ROWS), chosen][:, None]).sum(1))


@pytest.mark.parametrize("num_rows", [1, 8, 19, 64])
def test_on_tpus_the_likeliest_are_found_a_few_rows_at_a_time(num_rows, monkeypatch):
    logits = np.random.default_rng(num_rows).integers(0, 50, (num_rows, 300)).astype(np.float32)  # many are equal
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    monkeypatch.setattr(sampling, "current_device", lambda: Device("tpu", "TPU v5 lite"))
    largest, ids = sampling.likeliest(jnp.asarray(logits), 20)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(largest, np.take_along_axis(logits, order, axis=1))


@given(hnp.arrays(np.float32, 32, elements=st.floats(width=32, allow_nan=False)))
def test_the_integer_form_of_floats_keeps_their_order(values):
    ordered = np.asarray(sampling._to_ordered(jnp.asarray(values)))
    back = np.asarray(sampling._from_ordered(jnp.asarray(ordered)))
    np.testing.assert_array_equal(back.view(np.int32), values.view(np.int32))
    nonzero = values[np.abs(values) > 0]
    order = np.asarray(sampling._to_ordered(jnp.asarray(nonzero)))
    np.testing.assert_array_equal(np.sort(nonzero), nonzero[np.argsort(order, kind="stable")])
