"""What is measured, under our own names. The engine's snapshot and the counts of calls are the only sources.

Every label has few values, whatever clients send: no id, tenant, salt or text is one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxinfer.core import Core
from serve.exposition import Family
from serve.model_name import model_name

REASONS = ("stop", "length", "abort", "error")
"""Of `jaxinfer.types.TokenChunk`; all are shown from the start, so that rates are right from the first one on."""
CODES = ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL")
"""The same for calls; others are shown once they occur."""

GAUGES = (
    ("num_running", "requests_running", "Samples that have a row of the batch."),
    ("num_waiting", "requests_waiting", "Samples in the queue."),
    ("num_waiting_tokens", "prompt_tokens_waiting", "Prompt tokens not yet computed."),
)
COUNTERS = (
    ("prompt_tokens", "prompt_tokens_computed_total", "Prompt tokens computed; those recomputed count again."),
    ("generated_tokens", "generated_tokens_total", "Tokens generated."),
    ("query_tokens", "prefix_query_tokens_total", "Prompt tokens looked up in the prefix cache."),
    ("cached_tokens", "prefix_hit_tokens_total", "Of them, those that were cached."),
    ("preemptions", "preemptions_total", "Rows put back into the queue for lack of pages."),
    ("failed_steps", "failed_steps_total", "Device steps that failed and were recomputed."),
    ("nan_rows", "nan_rows_total", "Samples ended because the model computed NaN or infinity for them."),
    ("idle_leaks", "idle_leaks_total", "Times that nothing ran and pages were held or lost; more than 0 is a defect."),
    ("draft_tokens", "draft_tokens_total", "Tokens proposed by speculation."),
    ("accepted_tokens", "accepted_tokens_total", "Of them, those that were kept."),
    ("compiles_after_ready", "compiles_after_ready_total", "Programs compiled or loaded after the engine was ready."),
)
HISTOGRAMS = (
    ("queue_seconds", "queue_seconds", "Arrival to first scheduling, of each sample."),
    ("first_token_seconds", "time_to_first_token_seconds", "Arrival to first token, of each sample."),
    ("inter_token_seconds", "inter_token_seconds", "Time between two tokens of a sample."),
    ("request_seconds", "request_seconds", "Arrival to end, of each sample."),
    ("step_seconds", "step_seconds", "Steps of the engine."),
    ("host_seconds", "step_host_seconds", "Part of a step in which the engine did not wait for the device."),
)


def families(core: Core | None, ended: Mapping[str, int], *, takes_calls: bool, dropped_lines: int = 0
             ) -> Iterator[Family]:  # fmt: skip
    """core: None while it loads. ended: calls by status. takes_calls: not while it hangs or drains. dropped_lines: of
    the log.
    """
    is_ready = core is not None and core.engine.alive and takes_calls
    yield gauge("ready", "Whether new requests are served (1); 0 while the model loads, hangs, drains or has died.",
                is_ready)
    yield Family.by("jaxinfer_calls_total", "counter", "Calls that ended, by gRPC status: rejects, cancels, deadlines.",
                    "code", {**dict.fromkeys(CODES, 0), **ended}, {})
    yield Family.of("jaxinfer_log_lines_dropped_total", "counter", "Lines of the log that nobody took.",
                    dropped_lines, {})
    if core is None:
        return
    info = core.info
    yield Family.of("jaxinfer_model_info", "gauge", "The served model.", 1,
                    {"model_name": model_name(info.name), "family": info.family, "dtype": info.dtype})
    yield from engine_families(core.engine.metrics())


def engine_families(shown: Mapping[str, Any]) -> Iterator[Family]:
    """shown: the engine's snapshot."""
    for key, name, text in GAUGES:
        yield gauge(name, text, shown[key])
    yield from page_families(shown)
    for key, name, text in COUNTERS:
        yield Family.of(f"jaxinfer_{name}", "counter", text, shown.get(key, 0), {})
    yield counters("steps_total", "Device steps, by kind.", "kind",
                   {"prefill": shown["prefill_steps"], "decode": shown["decode_steps"]})
    yield counters("samples_finished_total", "Samples that ended, by the reason.", "reason",
                   {**dict.fromkeys(REASONS, 0), **shown["finished"]})
    yield counters("draft_rounds_total", "Rounds with proposals of a row, by how many it kept.", "accepted",
                   dict(sorted(shown["rounds_by_accepted"].items())))
    yield counters("remote_proposals_total", "Proposals of a drafter elsewhere, by what became of them.", "outcome",
                   shown.get("remote_proposals", {}))
    for key, name, text in HISTOGRAMS:
        yield Family.histogram(f"jaxinfer_{name}", text, shown[key], {})


def page_families(shown: Mapping[str, Any]) -> Iterator[Family]:
    # Three counts, none of them what the others leave: while nothing runs they add up, and none is used. (Otherwise a
    # page may change hands between the reads of two.)
    states = {"used": shown["pages_used"], "cached": shown["pages_cached"], "free": shown["pages_free"]}
    yield Family.by("jaxinfer_pages", "gauge", "Pages of the KV cache, by state.", "state", states, {})


def gauge(name: str, text: str, value: float) -> Family:
    return Family.of(f"jaxinfer_{name}", "gauge", text, int(value), {})


def counters(name: str, text: str, label: str, values: Mapping[Any, int]) -> Family:
    return Family.by(f"jaxinfer_{name}", "counter", text, label, values, {})
