"""Arrivals have the rate and the burstiness that were asked for, and follow from the seed."""

import math
import statistics

import pytest

from serve.bench.arrivals import arrivals


def gaps(num: int, rate: float, burstiness: float, seed: int = 0) -> list[float]:
    found = arrivals(num, rate, burstiness, seed)
    return [later - earlier for earlier, later in zip([0.0, *found], found, strict=False)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_mean_and_coefficient_of_variation(burstiness, seed):
    found = gaps(20_000, 50.0, burstiness, seed)
    assert min(found) >= 0
    assert statistics.fmean(found) == pytest.approx(1 / 50.0, rel=1e-9)
    assert statistics.pstdev(found) / statistics.fmean(found) == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_poisson_process_is_memoryless():
    """Of the gaps longer than the mean, a share of 1/e is longer by another mean; of all gaps, too."""
    found = gaps(20_000, 1.0, 1.0)
    longer = [gap for gap in found if gap > 1]
    assert len(longer) / len(found) == pytest.approx(math.exp(-1), rel=0.05)
    assert len([gap for gap in longer if gap > 2]) / len(longer) == pytest.approx(math.exp(-1), rel=0.05)


@pytest.mark.parametrize("num", [1, 7, 1000])
def test_the_last_arrives_when_the_rate_says(num):
    assert arrivals(num, 4.0, 1.0, 3)[-1] == pytest.approx(num / 4.0)


def test_the_seed_decides():
    assert arrivals(50, 2.0, 1.0, 5) == arrivals(50, 2.0, 1.0, 5)
    assert arrivals(50, 2.0, 1.0, 5) != arrivals(50, 2.0, 1.0, 6)


def test_the_ends_of_the_scale():
    assert arrivals(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]
    assert gaps(4, 8.0, math.inf) == pytest.approx([0.125] * 4)
    tiny = arrivals(5, 1.0, 1e-9, 0)
    assert tiny == sorted(tiny) and all(map(math.isfinite, tiny))
