"""Counters and histograms."""

import json
from types import SimpleNamespace

import pytest

from jaxinfer.core import Load
from jaxinfer.draft_lengths import Judged
from jaxinfer.metrics import FIRST_TOKEN_EDGES, INTER_TOKEN_EDGES, REQUEST_EDGES, Histogram, Metrics
from jaxinfer.types import RequestStats, StepKind


def make_metrics() -> Metrics:
    return Metrics(lambda: Load(1, 2, 3, 4, 5, 6))


def step(kind=StepKind.DECODE, num_rounds=1, tokens=((),), num_drafted=()):
    return SimpleNamespace(kind=kind, num_rounds=num_rounds, tokens=tokens, num_drafted=num_drafted,
                           slots=tuple(range(len(tokens))))


@pytest.mark.parametrize("edges", [FIRST_TOKEN_EDGES, INTER_TOKEN_EDGES, REQUEST_EDGES])
def test_edges_rise(edges: tuple[float, ...]):
    assert list(edges) == sorted(set(edges))


def test_a_value_on_an_edge_lies_below_it():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]


def test_buckets_are_cumulative_and_the_open_one_is_only_in_the_count():
    histogram = Histogram((1.0, 2.0))
    histogram.observe(0.5, times=3)
    histogram.observe(1.5)
    histogram.observe(50.0)
    shown = histogram.snapshot()
    assert shown["buckets"] == [(1.0, 3), (2.0, 4)]
    assert (shown["count"], shown["sum"]) == (5, 53.0)


@pytest.mark.parametrize(("share", "value"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 1.5), (1.0, 2.0)])
def test_quantiles_are_linear_within_a_bucket(share: float, value: float):
    histogram = Histogram((1.0, 2.0, 4.0))
    histogram.observe(0.9, times=10)
    histogram.observe(1.1, times=10)
    assert histogram.quantile(share) == pytest.approx(value)


def test_quantiles_end_at_the_highest_edge():
    histogram = Histogram((1.0, 2.0))
    assert histogram.quantile(0.5) == 0.0
    histogram.observe(100.0)
    assert histogram.quantile(0.5) == 2.0


def test_inter_token_time_is_shared_by_the_rounds_of_a_step():
    metrics = make_metrics()
    metrics.record_step(step(), 2, 10.0)
    metrics.record_step(step(num_rounds=4), 8, 12.0)
    assert metrics.inter_token_seconds.sum == pytest.approx(2 * 10.0 + 8 * 0.5)


def test_inter_token_time_is_shared_by_what_speculation_gave_a_row():
    metrics = make_metrics()
    metrics.record_step(step(), 1, 10.0)
    metrics.record_step(step(num_rounds=2, num_drafted=(3, 3), tokens=((), ())), 12, 13.0)
    assert metrics.inter_token_seconds.sum == pytest.approx(10.0 + 12 * 0.5)


def test_first_tokens_have_no_inter_token_time():
    metrics = make_metrics()
    metrics.record_first_token(RequestStats(arrival=1.0, first_token=3.5))
    metrics.record_step(step(StepKind.PREFILL, tokens=((), (1, 2, 3))), 2, 4.0)
    assert (metrics.first_token_seconds.count, metrics.first_token_seconds.sum) == (1, 2.5)
    assert (metrics.inter_token_seconds.count, metrics.prompt_tokens, metrics.generated_tokens) == (1, 3, 2)
    metrics.record_step(step(), 2, 5.0)
    assert metrics.inter_token_seconds.count == 3


def test_the_hit_rate_is_the_share_of_cached_prompt_tokens():
    metrics = make_metrics()
    assert metrics.prefix_hit_rate == 0.0
    metrics.record_start(RequestStats(num_prompt_tokens=30, num_cached_tokens=10))
    metrics.record_start(RequestStats(num_prompt_tokens=10))
    assert metrics.prefix_hit_rate == 0.25


def test_a_snapshot_is_plain_data_with_the_present_load():
    metrics = make_metrics()
    metrics.record_end("stop", RequestStats(arrival=1.0, finished=2.0))
    shown = json.loads(json.dumps(metrics.snapshot()))
    assert (shown["num_running"], shown["pages_total"], shown["finished"]) == (1, 6, {"stop": 1})
    assert shown["request_seconds"]["count"] == 1
    assert not [name for name in shown if name.startswith("_")]


def test_engines_do_not_share_their_counts():
    one, other = make_metrics(), make_metrics()
    one.record_end("stop", RequestStats())
    assert not other.finished and not other.request_seconds.count


def test_proposals_are_counted_by_what_was_kept():
    metrics = make_metrics()
    metrics.record_drafts([Judged(3, 3, True), Judged(3, 0, True)])
    metrics.record_drafts([Judged(2, 1, False)])
    assert (metrics.draft_tokens, metrics.accepted_tokens) == (8, 4)
    assert metrics.snapshot()["rounds_by_accepted"] == {3: 1, 0: 1, 1: 1}
