"""Figures of records made by hand: what each of vLLM's names means here."""

import json

import pytest

from serve.bench import results
from serve.bench.record import Record
from serve.bench.results import Run
from serve.bench.table import table

METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "server_ttft", "server_queue")


def record(due: float, sent: float, times: list[float], counts: list[int], **fields) -> Record:
    fields = {"status": "OK", "prompt_tokens": 10, "output_tokens": sum(counts), "handed": due, **fields}
    return Record(due, sent=sent, times=times, counts=counts, ended=times[-1] if times else sent, **fields)


FIRST = record(0.0, 0.1, [1.0, 1.5, 3.0], [1, 4, 2], server_ttft=0.8, server_queue=0.25, cached_tokens=4)
SECOND = record(1.0, 1.0, [1.25], [1])
REFUSED = record(2.0, 2.0, [], [], status="RESOURCE_EXHAUSTED", error="the queue is full", handed=2.5)
BROKEN = record(2.0, 2.0, [2.5], [3], status="UNAVAILABLE", error="stopping")
RUN = Run([FIRST, SECOND, REFUSED, BROKEN], 4.0, [0.001, 0.002])


def figures(limits=None, run=RUN):
    return results.results(run, METRICS, (50, 99.5), limits or {})


def test_counts_and_rates():
    found = figures()
    assert (found["completed"], found["failed"]) == (2, 2)
    assert found["failed_by_status"] == {"RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1}
    assert (found["total_input_tokens"], found["total_output_tokens"], found["total_cached_tokens"]) == (20, 8, 4)
    assert found["request_throughput"] == 2 / 4
    assert found["output_throughput"] == 8 / 4
    assert found["total_token_throughput"] == 28 / 4
    assert found["max_concurrent_requests"] == 2
    assert found["tokens_per_message"] == 8 / 4
    # From the first sending (0.1) on: 1 token at 0.9, 1 at 1.15, 4 at 1.4, 2 at 2.9.
    assert found["max_output_tokens_per_s"] == 5
    assert found["request_goodput"] is None
    assert found["p50_time_to_fail_ms"] == pytest.approx((0 + 500) / 2)
    assert figures(run=Run([FIRST], 4.0))["p99_time_to_fail_ms"] is None


def test_latencies_count_from_when_a_request_was_due():
    found = figures()
    assert found["mean_ttft_ms"] == pytest.approx((1000 + 250) / 2)
    assert found["mean_e2el_ms"] == pytest.approx((3000 + 250) / 2)
    assert found["std_e2el_ms"] == pytest.approx((3000 - 250) / 2)
    assert found["mean_client_queue_time_ms"] == pytest.approx(50)
    assert found["mean_server_ttft_ms"] == pytest.approx(800)
    assert found["p50_server_queue_ms"] == pytest.approx(250)


def test_time_per_output_token_is_of_outputs_longer_than_one():
    assert figures()["mean_tpot_ms"] == pytest.approx(2000 / 6)
    assert figures(run=Run([SECOND], 1.0))["mean_tpot_ms"] is None


def test_inter_token_latency_is_between_messages_whatever_they_hold():
    found = figures()
    assert found["mean_itl_ms"] == pytest.approx((500 + 1500) / 2)
    assert found["p99.5_itl_ms"] == pytest.approx(500 + 0.995 * 1000)


@pytest.mark.parametrize(("limits", "good"), [
    ({"ttft": 1000}, 2), ({"ttft": 999}, 1), ({"tpot": 300}, 1), ({"tpot": 334, "e2el": 3000}, 2), ({"e2el": 100}, 0),
])  # fmt: skip
def test_goodput(limits, good):
    assert figures(limits)["request_goodput"] == good / 4


def test_the_clients_own_lateness():
    found = figures()
    assert found["max_generator_lag_ms"] == pytest.approx(500) and found["p50_generator_lag_ms"] == 0
    assert found["p50_loop_lag_ms"] == pytest.approx(1.5)
    assert "sent requests" in (results.distrust(RUN) or "")
    assert "read answers" in (results.distrust(Run([FIRST], 4.0, [0.2] * 9)) or "")
    assert results.distrust(Run([FIRST, SECOND], 4.0, [0.001])) is None
    assert results.distrust(Run([REFUSED], 4.0, [])) is None
    fast = record(0.0, 0.0, [0.002], [1], handed=0.0009)
    assert results.distrust(Run([fast], 1.0)) is None and results.distrust(Run([fast], 1.0, [0.0011])) is not None


def test_details_are_one_a_request():
    found = results.detailed(RUN.records)
    assert all(len(values) == 4 for values in found.values())
    assert found["output_lens"] == [7, 1, 0, 0]
    assert found["itls"] == [[0.5, 1.5], [], [], []]
    assert found["ttfts"][:3] == [1.0, 0.25, 0]
    assert found["errors"] == ["", "", "the queue is full", "stopping"]
    json.dumps(found)


def test_a_run_without_answers_has_figures_too():
    found = figures({"ttft": 1}, Run([REFUSED], 0.0))
    assert (found["completed"], found["mean_ttft_ms"], found["request_goodput"]) == (0, None, 0)
    shown = table({**found, "max_concurrency": 3, "request_rate": 2.0}, METRICS, (99.5,))
    assert "Mean TTFT (ms):                          -" in shown


def test_the_table():
    shown = table({**figures({"ttft": 1}), "max_concurrency": 3, "request_rate": 2.0,
                   "spec_decode_acceptance_rate": 50.0, "spec_decode_acceptance_length": 1.5,
                   "spec_decode_num_drafts": 4, "spec_decode_draft_tokens": 8, "spec_decode_accepted_tokens": 4,
                   "spec_decode_per_position_acceptance_rates": [0.75, 0.25]}, METRICS, (50, 99.5))
    lines = {line[:40].strip(): line[40:].strip() for line in shown.splitlines()}
    assert lines["Successful requests:"] == "2" and lines["RESOURCE_EXHAUSTED:"] == "1"
    assert lines["Request rate configured (RPS):"] == "2.00" and lines["Maximum request concurrency:"] == "3"
    assert lines["P99.5 ITL (ms):"] == "1495.00" and lines["Position 1:"] == "25.00"
    assert shown.splitlines()[0] == "============ Serving Benchmark Result ============"
    assert all(len(line) <= 52 for line in shown.splitlines())
