"""The metrics under vLLM's names, over a real HTTP connection."""

import urllib.request
from collections import Counter

import pytest
from counting_engine import CountingEngine, make_core
from prometheus_client.parser import text_string_to_metric_families
from serving import Served, eventually, serving

from jaxinfer.errors import InvalidConfig
from serve.server import ServerConfig
from serve.vllm_metrics import kept_by_place

KINDS = {
    "vllm:num_requests_running": "gauge", "vllm:num_requests_waiting": "gauge", "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prompt_tokens": "counter", "vllm:generation_tokens": "counter", "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter", "vllm:num_preemptions": "counter", "vllm:corrupted_requests": "counter",
    "vllm:request_success": "counter",
    "vllm:spec_decode_num_drafts": "counter", "vllm:spec_decode_num_draft_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens": "counter", "vllm:spec_decode_num_accepted_tokens_per_pos": "counter",
    "vllm:time_to_first_token_seconds": "histogram", "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram", "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram", "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram", "vllm:request_generation_tokens": "histogram"}


def families(served: Served) -> dict:
    assert served.server.metrics is not None
    with urllib.request.urlopen(served.server.metrics.url, timeout=5) as answer:  # noqa: S310 (our own address)
        return {one.name: one for one in text_string_to_metric_families(answer.read().decode())}


def test_names_types_and_values_are_those_of_vllm():
    with serving(make_core(CountingEngine()), metrics_port=0, metrics_compat="vllm") as served:
        left = served.client.stream([1, 2], max_tokens=9)
        stream = served.client.stream([1] * 8, max_tokens=3, temperature=0)
        eventually(lambda: len(served.engine.rows) == 2)
        for _ in range(3):
            served.engine.step()
        list(stream)
        found = families(served)
        left.cancel()
    vllm = {name: one for name, one in found.items() if name.startswith("vllm:")}
    assert {name: one.type for name, one in vllm.items()} == KINDS
    values = {(one.name, one.labels.get("finished_reason")): one.value
              for family in vllm.values() for one in family.samples if "le" not in one.labels}
    assert values["vllm:num_requests_running", None] == 1
    assert values["vllm:kv_cache_usage_perc", None] == 3 / 64
    assert values["vllm:prompt_tokens_total", None] == values["vllm:prefix_cache_queries_total", None] == 10
    assert values["vllm:prefix_cache_hits_total", None] == 5
    assert values["vllm:generation_tokens_total", None] == 6
    assert values["vllm:request_success_total", "length"] == 1
    assert values["vllm:time_to_first_token_seconds_count", None] == 2
    assert values["vllm:e2e_request_latency_seconds_count", None] == 1
    assert values["vllm:request_prompt_tokens_sum", None] == 8
    assert values["vllm:request_generation_tokens_sum", None] == 3
    assert values["vllm:request_decode_time_seconds_count", None] == 1
    assert all(one.labels["model_name"] == "counting" and one.labels["engine"] == "0"
               for family in vllm.values() for one in family.samples)
    assert "jaxinfer_step_seconds" in found


def test_our_names_are_alone_unless_asked():
    with serving(make_core(CountingEngine()), metrics_port=0) as served:
        assert not [name for name in families(served) if name.startswith("vllm")]


def test_nothing_of_vllm_is_shown_while_the_model_loads():
    with serving(None, metrics_port=0, metrics_compat="vllm") as served:
        assert not [name for name in families(served) if name.startswith("vllm")]


def test_kept_tokens_by_place_add_up():
    rounds = Counter({0: 5, 1: 3, 4: 2})
    assert kept_by_place(rounds) == {0: 5, 1: 2, 2: 2, 3: 2}
    assert sum(kept_by_place(rounds).values()) == sum(kept * times for kept, times in rounds.items())
    assert kept_by_place({}) == {}


def test_other_names_are_refused():
    with pytest.raises(InvalidConfig, match="metrics_compat"):
        ServerConfig(metrics_compat="sglang")
