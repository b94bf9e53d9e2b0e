"""The same numbers under the names of vLLM's metrics, for gateways and dashboards that know those.

Names, types and meaning: vLLM's documentation, "Production Metrics". What we do not measure is left out, not 0.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxinfer.core import Core
from serve.exposition import Family
from serve.metric_families import REASONS
from serve.model_name import model_name

COUNTERS = (
    ("query_tokens", "prompt_tokens_total", "Prompt tokens of samples that were started, cached ones included."),
    ("generated_tokens", "generation_tokens_total", "Tokens generated."),
    ("query_tokens", "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
    ("cached_tokens", "prefix_cache_hits_total", "Of them, those that were cached."),
    ("preemptions", "num_preemptions_total", "Preemptions."),
    ("nan_rows", "corrupted_requests_total", "Samples ended by NaN or infinity."),
    ("draft_tokens", "spec_decode_num_draft_tokens_total", "Tokens proposed by speculation."),
    ("accepted_tokens", "spec_decode_num_accepted_tokens_total", "Of them, those that were kept."),
)
HISTOGRAMS = (
    ("first_token_seconds", "time_to_first_token_seconds", "Arrival to first token."),
    ("inter_token_seconds", "inter_token_latency_seconds", "Time between two tokens."),
    ("request_seconds", "e2e_request_latency_seconds", "Arrival to end."),
    ("queue_seconds", "request_queue_time_seconds", "Arrival to first scheduling."),
    ("prefill_seconds", "request_prefill_time_seconds", "First scheduling to first token."),
    ("decode_seconds", "request_decode_time_seconds", "First token to end."),
    ("prompt_lengths", "request_prompt_tokens", "Prompt tokens of samples that ended."),
    ("output_lengths", "request_generation_tokens", "Tokens of samples that ended."),
)


def vllm_families(core: Core) -> Iterator[Family]:
    """Of one engine, which is number 0, as where vLLM runs one."""
    shown, labels = core.engine.metrics(), {"model_name": model_name(core.info.name), "engine": "0"}
    yield from gauges(shown, labels)
    for key, name, text in COUNTERS:
        yield Family.of(f"vllm:{name}", "counter", text, shown[key], labels)
    yield Family.by("vllm:request_success_total", "counter", "Samples that ended, by the reason.", "finished_reason",
                    {**dict.fromkeys(REASONS, 0), **shown["finished"]}, labels)
    yield Family.of("vllm:spec_decode_num_drafts_total", "counter", "Rounds with proposals.",
                    sum(shown["rounds_by_accepted"].values()), labels)
    yield Family.by("vllm:spec_decode_num_accepted_tokens_per_pos_total", "counter", "Tokens kept, by place in it.",
                    "position", kept_by_place(shown["rounds_by_accepted"]), labels)
    for key, name, text in HISTOGRAMS:
        yield Family.histogram(f"vllm:{name}", text, shown[key], labels)


def gauges(shown: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Family]:
    share = shown["pages_used"] / shown["pages_total"] if shown["pages_total"] else 0.0
    for name, text, value in (
        ("num_requests_running", "Samples that have a row of the batch.", shown["num_running"]),
        ("num_requests_waiting", "Samples in the queue.", shown["num_waiting"]),
        ("kv_cache_usage_perc", "Share of the pages in use, 0 to 1.", share),
    ):
        yield Family.of(f"vllm:{name}", "gauge", text, value, labels)


def kept_by_place(rounds_by_accepted: Mapping[int, int]) -> dict[int, int]:
    """A round that kept k proposals kept those at the places 0 to k - 1."""
    most = max(rounds_by_accepted, default=0)
    return {place: sum(times for kept, times in rounds_by_accepted.items() if kept > place) for place in range(most)}
