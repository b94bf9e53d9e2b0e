"""Statistics against NumPy and against cases made by hand."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.bench import figures

FLOATS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(FLOATS, st.floats(0, 100))
def test_percentiles_are_numpys(values, share):
    assert figures.percentile(sorted(values), share) == pytest.approx(np.percentile(values, share), rel=1e-9, abs=1e-6)


@given(FLOATS)
def test_mean_median_and_deviation_are_numpys(values):
    found = figures.summary(values, [99.9])
    wanted = {"mean": np.mean, "median": np.median, "std": np.std, "p99.9": lambda some: np.percentile(some, 99.9)}
    assert found.keys() == wanted.keys()
    for name, function in wanted.items():
        assert found[name] == pytest.approx(function(values), rel=1e-9, abs=1e-6), name


def test_by_hand():
    assert figures.percentile([1.0, 2.0, 3.0, 10.0], 50) == 2.5
    assert figures.percentile([1.0, 2.0, 3.0, 10.0], 100) == 10.0
    assert figures.percentile([7.0], 99) == 7.0
    assert figures.std([1.0, 3.0]) == 1.0  # divided by n, not n - 1


def test_nothing_has_no_figures():
    assert figures.summary([], [50, 99]) == dict.fromkeys(("mean", "median", "std", "p50", "p99"))


@pytest.mark.parametrize(("spans", "most"), [
    ([], 0),
    ([(0, 1)], 1),
    ([(0, 1), (1, 2)], 1),  # an end is outside
    ([(0, 2), (1, 3), (2, 4)], 2),
    ([(0, 9), (1, 2), (3, 4), (3.5, 5)], 3),
    ([(1, 1), (1, 1)], 0),
])  # fmt: skip
def test_peak_overlap(spans, most):
    assert figures.peak_overlap(spans) == most


def test_overlap_at_counts_as_a_plain_loop_does():
    rng = random.Random(1)
    spans = [(begin, begin + rng.random()) for begin in (rng.random() * 3 for _ in range(50))]
    times = [number / 20 for number in range(80)]
    wanted = [sum(begin <= time < end for begin, end in spans) for time in times]
    assert figures.overlap_at(spans, times) == wanted and max(wanted) > 5


def test_counts_a_second():
    assert figures.per_second([(0.1, 3), (0.9, 1), (2.0, 5)]) == [4, 0, 5]
    assert figures.per_second([(0.1, 3), (0.3, 1)], width=0.25) == [12, 4]
    assert figures.per_second([]) == []


def test_a_limit_itself_is_within():
    assert figures.is_good({"ttft": 200.0, "tpot": 9.0}, {"ttft": 200.0})
    assert not figures.is_good({"ttft": 200.1, "tpot": 9.0}, {"ttft": 200.0, "tpot": 50.0})
    assert figures.is_good({"ttft": 1e9}, {})
