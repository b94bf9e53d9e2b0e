"""Statistics of a run. Pure: floats in, floats out; NumPy's definitions without NumPy, whose import takes long."""

import math
from collections.abc import Iterable, Mapping, Sequence


def mean(values: Sequence[float]) -> float | None:
    """None of nothing, as everything here."""
    return math.fsum(values) / len(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """Of the population (divided by n), as numpy.std."""
    middle = mean(values)
    if middle is None:
        return None
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / len(values))


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Of sorted values, `share` in [0, 100], linear between neighbours, as numpy.percentile."""
    if not ordered:
        return None
    place = share / 100 * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(values: Iterable[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """mean, median, std and p<N> of values, in their unit."""
    ordered = sorted(values)
    found = {"mean": mean(ordered), "median": percentile(ordered, 50), "std": std(ordered)}
    return found | {f"p{share:g}": percentile(ordered, share) for share in percentiles}


def peak_overlap(spans: Iterable[tuple[float, float]]) -> int:
    """Most of the half-open spans [begin, end) that hold one moment."""
    # At equal times ends come first, since a span does not hold its own end.
    events = sorted(event for begin, end in spans for event in ((begin, 1), (end, -1)))
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


def per_second(events: Iterable[tuple[float, int]], width: float = 1.0) -> list[float]:
    """Counts a second in buckets of `width` seconds from 0 on. events: (seconds, count)."""
    counts: dict[int, int] = {}
    for when, count in events:
        counts[int(when / width)] = counts.get(int(when / width), 0) + count
    return [counts.get(bucket, 0) / width for bucket in range(max(counts, default=-1) + 1)]


def overlap_at(spans: Sequence[tuple[float, float]], times: Iterable[float]) -> list[int]:
    """How many of the half-open spans hold each time; times ascend."""
    begins, ends = sorted(begin for begin, _ in spans), sorted(end for _, end in spans)
    found, begun, ended = [], 0, 0
    for time in times:
        while begun < len(begins) and begins[begun] <= time:
            begun += 1
        while ended < len(ends) and ends[ended] <= time:
            ended += 1
        found.append(begun - ended)
    return found


def is_good(latencies: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether a request stayed within every limit, in the same unit; a limit itself is within."""
    return all(latencies[key] <= limit for key, limit in limits.items())
