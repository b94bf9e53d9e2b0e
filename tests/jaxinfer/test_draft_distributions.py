"""Distributions of drafted tokens: made of log-probabilities as a sampler makes them, checked as in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.draft_distributions import TIE, Claimed, Distributions, checked, of_top, placed

VOCAB = 6
CHANCES = st.sampled_from([0.0, 0.25, 0.5, 0.5005, 1.0, 1.002, 2.0, -0.5, math.nan, math.inf, -math.inf, 1e-38])


def counts_for(ids: list[int], chances: list[float], token: int) -> bool:
    """Whether it is a distribution that the token may come from."""
    known = [id for id, chance in zip(ids, chances, strict=True) if chance > 0]
    return (all(math.isfinite(chance) and chance >= 0 for chance in chances) and abs(sum(chances) - 1) <= 1e-3
            and len(set(known)) == len(known) and all(0 <= id < VOCAB for id in known) and token in known)  # fmt: skip


@given(data=st.data())
def test_what_counts_is_a_distribution_and_the_rest_is_given(data):
    width, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    ids = [data.draw(st.lists(st.integers(-1, VOCAB), min_size=width, max_size=width)) for _ in range(count)]
    chances = [data.draw(st.lists(CHANCES, min_size=width, max_size=width)) for _ in range(count)]
    tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=count, max_size=count))
    told = Distributions(np.array(ids, np.int32), np.array(chances, np.float32))
    found, num_told, num_malformed = checked(told, np.array(tokens, np.int32), VOCAB)
    good = [counts_for(*one) for one in zip(ids, chances, tokens, strict=True)]
    assert (num_told, num_malformed) == (sum(good), sum(any(chance != 0 for chance in one) and not counts
                                                       for one, counts in zip(chances, good, strict=True)))  # fmt: skip
    for row, token in enumerate(tokens):
        dense = np.zeros(VOCAB)
        np.add.at(dense, found.ids[row], found.chances[row])
        wanted = np.eye(VOCAB)[token]
        if good[row]:
            wanted = np.zeros(VOCAB)
            for id, chance in zip(ids[row], chances[row], strict=True):
                wanted[id if chance else 0] += chance / sum(chances[row])
        np.testing.assert_allclose(dense, wanted, rtol=1e-6)


@pytest.mark.parametrize("changes", [{"num_candidates": 0}, {"num_candidates": -2}, {"num_candidates": 3},
                                     {"num_candidates": 2**31 - 1}, {"num_tokens": 4}, {"ids": np.zeros(5, np.int32)},
                                     {"chances": np.zeros(7, np.float32)}])  # fmt: skip
def test_claims_of_another_length_are_no_numbers(changes):
    good = Claimed(3, 2, np.arange(6, dtype=np.int32), np.full(6, 0.5, np.float32))
    assert placed(good, 1, 2, 4).ids.tolist() == [[2, 3, 0, 0], [4, 5, 0, 0]]
    assert placed(good, 1, 2, 4).chances.tolist() == [[0.5, 0.5, 0, 0]] * 2
    assert np.isnan(placed(good._replace(**changes), 1, 2, 2).chances).all()
    assert not placed(None, 1, 2, 4).chances.any()


@given(st.lists(st.floats(-30, 0), min_size=2, max_size=9), st.floats(0.05, 2.0))
def test_what_a_request_samples_from(logprobs, temperature):
    most = 4
    logprobs = sorted(logprobs, reverse=True)
    ids, chances = of_top(list(enumerate(logprobs[:most + 1])), temperature, most)
    assert len(ids) == len(chances) == most
    if len(logprobs) > most and logprobs[most - 1] - logprobs[most] <= TIE:
        assert not any(chances)
        return
    weights = np.exp((np.array(logprobs[:most]) - logprobs[0]) / temperature)
    np.testing.assert_allclose(chances[:len(weights)], weights / weights.sum(), rtol=1e-9)
    assert ids[:len(weights)] == list(range(len(weights))) and not any(chances[len(weights):])
