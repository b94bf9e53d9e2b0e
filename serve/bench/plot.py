"""A run as a picture: what was in flight, what came of it, and how latencies are spread."""

from collections.abc import Mapping, Sequence
from typing import Any

from serve.bench import figures
from serve.bench.record import Record
from serve.bench.results import VALUES, arrived
from serve.bench.svg_chart import Panel, Point, Series, chart

PLACES = 300
"""Of a line along the time axis."""
SHARES = (*range(99), 99.0, 99.5, 99.9, 100.0)
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


def plot(records: Sequence[Record], found: Mapping[str, Any]) -> str:
    """An SVG file. found: the figures of the same run."""
    rate = "all at once" if found["request_rate"] == "inf" else f"{found['request_rate']:g} requests/s"
    title = f"{found['model_id']}: {found['completed']} of {len(records)} requests completed, {rate}"
    done = [one for one in records if one.completed]
    seconds = max((one.ended for one in records), default=0.0)
    return chart(title, [
        Panel("Requests that have arrived and not ended", "seconds", [Series("requests", in_flight(records, seconds))],
              x_most=seconds),
        Panel("Output tokens a second", "seconds", [Series("tokens/s", token_rate(records, seconds))], x_most=seconds),
        Panel("Latency in milliseconds, by percentile", "percentile",
              [Series(NAMES[key], spread(done, key)) for key in NAMES], is_log=True),
    ])


def in_flight(records: Sequence[Record], seconds: float) -> list[Point]:
    times = [seconds * number / PLACES for number in range(PLACES + 1)]
    counts = figures.overlap_at([(one.due, one.ended) for one in records], times)
    return list(zip(times, map(float, counts), strict=True))


def token_rate(records: Sequence[Record], seconds: float) -> list[Point]:
    """Buckets of a second, narrower in runs of less than 30 seconds."""
    width = min(1.0, max(seconds / 30, 1e-3))
    rates = figures.per_second(arrived(records), width)
    return [((number + 0.5) * width, rate) for number, rate in enumerate(rates)]


def spread(done: Sequence[Record], key: str) -> list[Point]:
    ordered = sorted(value * 1e3 for one in done for value in VALUES[key](one) if value is not None)
    return [(share, value) for share in SHARES if (value := figures.percentile(ordered, share)) is not None]
