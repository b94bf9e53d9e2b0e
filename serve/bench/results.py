"""From records to figures, under the names of `vllm bench serve`. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.bench import figures
from serve.bench.record import Record

VALUES: dict[str, Callable[[Record], Iterable[float | None]]] = {
    "ttft": lambda one: [one.ttft],
    "tpot": lambda one: [one.tpot],
    "itl": lambda one: one.itls,
    "e2el": lambda one: [one.e2el],
    "client_queue_time": lambda one: [one.client_queue_time],
    "server_ttft": lambda one: [one.server_ttft],
    "server_queue": lambda one: [one.server_queue],
}
SHARES = (50.0, 99.0)
"""Percentiles of what has no others."""
LATE_SHARE = 0.1
"""A client whose lateness is more than this share of the TTFT, median or p99, has measured itself."""
TIMER_SECONDS = 1e-3
"""asyncio's timers are no finer on Linux: less lateness than this is no sign of load."""


@dataclass(slots=True)
class Run:
    """duration: seconds from the start to the last end. loop_lags: how late the client's event loop woke, sampled
    throughout: messages are read as late.
    """

    records: list[Record]
    duration: float
    loop_lags: list[float] = field(default_factory=list)


def results(run: Run, metrics: Sequence[str], percentiles: Sequence[float], limits: Mapping[str, float]
            ) -> dict[str, Any]:  # fmt: skip
    """Everything but the arrays of `detailed`. limits: of goodput, milliseconds."""
    done = [one for one in run.records if one.completed]
    seconds = max(run.duration, 1e-9)
    inputs, outputs = sum(one.prompt_tokens for one in done), sum(one.output_tokens for one in done)
    good = sum(figures.is_good(milliseconds(one), limits) for one in done)
    found: dict[str, Any] = {
        "duration": run.duration,
        "completed": len(done),
        "failed": len(run.records) - len(done),
        "failed_by_status": dict(Counter(one.status for one in run.records if not one.completed)),
        "total_input_tokens": inputs,
        "total_cached_tokens": sum(one.cached_tokens for one in done),
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "request_goodput": good / seconds if limits else None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_output_tokens_per_s": peak_rate(done),
        "max_concurrent_requests": figures.peak_overlap((one.sent, one.ended) for one in done),
        "tokens_per_message": outputs / max(sum(len(one.times) for one in done), 1),
    }
    for name in metrics:
        values = [value * 1e3 for one in done for value in VALUES[name](one) if value is not None]
        found |= {f"{key}_{name}_ms": value for key, value in figures.summary(values, percentiles).items()}
    return found | time_to_fail(run.records) | lags(run)


def time_to_fail(records: Sequence[Record]) -> dict[str, float | None]:
    """Due to the error: a server that refuses should do so at once."""
    ordered = sorted(one.e2el * 1e3 for one in records if not one.completed)
    return {f"p{share:g}_time_to_fail_ms": figures.percentile(ordered, share) for share in SHARES}


def milliseconds(one: Record) -> dict[str, float]:
    """What goodput's limits are held against; an output of one token has a TPOT of 0."""
    return {"ttft": one.ttft * 1e3, "tpot": (one.tpot or 0.0) * 1e3, "e2el": one.e2el * 1e3}


def peak_rate(done: Sequence[Record]) -> float:
    """Most output tokens in one second, counted from when the first request was sent."""
    begin = min((one.sent for one in done), default=0.0)
    return max(figures.per_second(arrived(done, begin)), default=0.0)


def arrived(records: Iterable[Record], begin: float = 0.0) -> list[tuple[float, int]]:
    """Seconds since `begin` and tokens of every message."""
    return [(time - begin, count) for one in records for time, count in zip(one.times, one.counts, strict=True)]


def lags(run: Run) -> dict[str, float | None]:
    """How late the client itself was, in milliseconds."""
    found: dict[str, float | None] = {}
    for name, values in (("generator_lag", [one.lag for one in run.records]), ("loop_lag", run.loop_lags)):
        ordered = sorted(value * 1e3 for value in values)
        found |= {f"p{share:g}_{name}_ms": figures.percentile(ordered, share) for share in SHARES}
        found[f"max_{name}_ms"] = ordered[-1] if ordered else None
    return found


def distrust(run: Run) -> str | None:
    """Why the figures should not be believed; None if the client kept up."""
    waits = sorted(one.ttft for one in run.records if one.completed)
    for name, values in (("sent requests", [one.lag for one in run.records]), ("read answers", run.loop_lags)):
        ordered = sorted(values)
        for share in SHARES:
            wait, late = figures.percentile(waits, share), figures.percentile(ordered, share)
            if wait is not None and late is not None and late > max(LATE_SHARE * wait, TIMER_SECONDS):
                return (f"this client {name} {late * 1e3:.1f} ms late (p{share:g}), over {LATE_SHARE:.0%} of the TTFT: "
                        "it has measured itself, too; give it a core of its own, or a lower rate")
    return None


def detailed(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One entry a request, in the order of their arrivals. Seconds; 0 where a request failed."""
    return {
        "input_lens": [one.prompt_tokens for one in records],
        "output_lens": [one.output_tokens if one.completed else 0 for one in records],
        "ttfts": [one.ttft for one in records],
        "itls": [one.itls for one in records],
        "latencies": [one.e2el for one in records],
        "arrival_times": [one.due for one in records],
        "start_times": [one.sent for one in records],
        "queue_times": [one.client_queue_time for one in records],
        "generated_texts": [one.text for one in records],
        "statuses": [one.status for one in records],
        "errors": [one.error for one in records],
    }
