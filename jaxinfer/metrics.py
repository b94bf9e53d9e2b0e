"""Counters and latency histograms of one engine, and their snapshot. No jax, nothing global.

One thread writes; others may take a snapshot at any time and at worst see a step half counted.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from jaxinfer.core import Load
from jaxinfer.draft_lengths import Judged
from jaxinfer.types import RequestStats, StepKind, StepPlan

# Upper edges in seconds. vLLM's (vllm/v1/metrics/loggers.py), so that dashboards carry over; all but the first begin
# lower, since tokens, and whole requests to small models, take less than 0.1 s.
FIRST_TOKEN_EDGES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0)
INTER_TOKEN_EDGES = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0)
REQUEST_EDGES = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3,
    0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TOKEN_EDGES = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
STEP_EDGES = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """Counts of values between fixed edges; the last bucket is open."""

    def __init__(self, edges: tuple[float, ...]):
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.edges, value)] += times
        self.sum += value * times

    def quantile(self, share: float) -> float:
        """Where `share` of the values lie at or below, linear within a bucket; the highest edge if beyond it."""
        rank, below = share * self.count, 0
        for index, edge in enumerate(self.edges):
            if below + self.counts[index] >= rank > below:
                low = self.edges[index - 1] if index else 0.0
                return low + (edge - low) * (rank - below) / self.counts[index]
            below += self.counts[index]
        return self.edges[-1] if below < rank else 0.0

    def snapshot(self) -> dict[str, Any]:
        """count, sum, cumulative counts by upper edge (as Prometheus has them), and two quantiles."""
        total = 0
        buckets: list[tuple[float, int]] = []
        for edge, count in zip(self.edges, self.counts, strict=False):
            total += count
            buckets.append((edge, total))
        return {"count": self.count, "sum": self.sum, "buckets": buckets,
                "p50": self.quantile(0.5), "p99": self.quantile(0.99)}


@dataclass(slots=True)
class Metrics:
    """What one engine did since it started.

    load: gives the present state, which a snapshot includes. finished: samples by the reason of their end.
    prompt_tokens were computed, cached_tokens came from the prefix cache, query_tokens were looked up there.
    draft_tokens were proposed for generated ones, accepted_tokens are those of them that were kept; rounds_by_accepted
    counts a row's rounds with proposals by how many it kept.
    prompt_lengths, output_lengths: tokens of samples that ended. prefill_seconds, decode_seconds: of those that had a
    token, from when they were scheduled first to it, and from there to the end.
    step_seconds: of the engine's steps that committed something; host_seconds: the part in which it did not wait for
    the device. nan_rows: samples ended by NaN or infinity.
    idle_leaks: times that nothing ran and pages were not given back.
    A request of n samples counts n times.
    """

    load: Callable[[], Load]
    finished: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    query_tokens: int = 0
    cached_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    failed_steps: int = 0
    nan_rows: int = 0
    idle_leaks: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    rounds_by_accepted: Counter[int] = field(default_factory=Counter)
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_EDGES))
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_EDGES))
    inter_token_seconds: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_EDGES))
    request_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_EDGES))
    prompt_lengths: Histogram = field(default_factory=lambda: Histogram(TOKEN_EDGES))
    output_lengths: Histogram = field(default_factory=lambda: Histogram(TOKEN_EDGES))
    prefill_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_EDGES))
    decode_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_EDGES))
    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_EDGES))
    host_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_EDGES))
    _last_commit: float = 0.0
    _num_first: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of looked-up prompt tokens that were cached."""
        return self.cached_tokens / self.query_tokens if self.query_tokens else 0.0

    def record_start(self, stats: RequestStats) -> None:
        """A sample was scheduled for the first time."""
        self.queue_seconds.observe(stats.scheduled - stats.arrival)
        self.query_tokens += stats.num_prompt_tokens
        self.cached_tokens += stats.num_cached_tokens

    def record_first_token(self, stats: RequestStats) -> None:
        """The step that is about to be recorded gave a sample its first token."""
        self._num_first += 1
        self.first_token_seconds.observe(stats.first_token - stats.arrival)

    def record_step(self, plan: StepPlan, num_tokens: int, now: float) -> None:
        """A step was committed that gave `num_tokens`.

        Every running row decodes in every step, so but for first tokens they came one step after their predecessors.
        (A row that lacked pages or was preempted waited longer; that goes uncounted.)
        """
        if plan.kind is StepKind.PREFILL:
            self.prefill_steps += 1
            self.prompt_tokens += sum(map(len, plan.tokens))
        else:
            self.decode_steps += 1
        self.generated_tokens += num_tokens
        if num_tokens > self._num_first:
            # With proposals a row gets more than a token a round.
            a_row = num_tokens / len(plan.slots) if plan.num_drafted else plan.num_rounds
            self.inter_token_seconds.observe((now - self._last_commit) / max(a_row, 1), num_tokens - self._num_first)
        self._last_commit, self._num_first = now, 0

    def record_times(self, step: float, waiting: float) -> None:
        """Seconds that a step of the engine took, and those of them in which it waited for the device."""
        self.step_seconds.observe(step)
        self.host_seconds.observe(step - waiting)

    def record_drafts(self, rounds: Iterable[Judged]) -> None:
        """Rows' rounds with proposals, of a committed step."""
        for made, kept, _ in rounds:
            self.draft_tokens += made
            self.accepted_tokens += kept
            self.rounds_by_accepted[kept] += 1

    def record_end(self, reason: str, stats: RequestStats) -> None:
        """A sample ended."""
        self.finished[reason] += 1
        self.request_seconds.observe(stats.finished - stats.arrival)
        self.prompt_lengths.observe(stats.num_prompt_tokens)
        self.output_lengths.observe(stats.num_output_tokens)
        if stats.first_token:
            self.prefill_seconds.observe(stats.first_token - stats.scheduled)
            self.decode_seconds.observe(stats.finished - stats.first_token)

    def snapshot(self) -> dict[str, Any]:
        """Plain data: numbers, and one dict for each histogram."""
        values: dict[str, Any] = asdict(self.load())
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Histogram):
                values[one.name] = value.snapshot()
            elif isinstance(value, int) and not one.name.startswith("_"):
                values[one.name] = value
        return values | {"finished": dict(self.finished), "rounds_by_accepted": dict(self.rounds_by_accepted),
                         "prefix_hit_rate": self.prefix_hit_rate}
