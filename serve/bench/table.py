"""Figures as the table that users of `vllm bench serve` know."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WIDTH, NAME_WIDTH = 50, 40
SECTIONS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
    "client_queue_time": ("Client-side Queueing", "Client Queue Time"),
    "server_ttft": ("Time to First Token, by the server", "server TTFT"),
    "server_queue": ("Queueing, by the server", "server queue"),
}
SPECULATION = (
    ("Acceptance rate (%):", "acceptance_rate"),
    ("Acceptance length:", "acceptance_length"),
    ("Drafts:", "num_drafts"),
    ("Draft tokens:", "draft_tokens"),
    ("Accepted tokens:", "accepted_tokens"),
)


def table(found: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """found: as saved."""
    return "\n".join([*head(found), *latencies(found, metrics, percentiles), *speculation(found), *client(found),
                      "=" * WIDTH])


def head(found: Mapping[str, Any]) -> Iterator[str]:
    yield title(" Serving Benchmark Result ", "=")
    yield line("Successful requests:", found["completed"])
    yield line("Failed requests:", found["failed"])
    for status, number in sorted(found["failed_by_status"].items()):
        yield line(f"  {status}:", number)
    if found["failed"]:
        yield line("  P99 time to fail (ms):", found["p99_time_to_fail_ms"])
    if found["max_concurrency"] is not None:
        yield line("Maximum request concurrency:", found["max_concurrency"])
    if found["request_rate"] != "inf":
        yield line("Request rate configured (RPS):", found["request_rate"])
    yield line("Benchmark duration (s):", found["duration"])
    yield line("Total input tokens:", found["total_input_tokens"])
    yield line("  of them cached:", found["total_cached_tokens"])
    yield line("Total generated tokens:", found["total_output_tokens"])
    yield line("Request throughput (req/s):", found["request_throughput"])
    if found["request_goodput"] is not None:
        yield line("Request goodput (req/s):", found["request_goodput"])
    yield line("Output token throughput (tok/s):", found["output_throughput"])
    yield line("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"])
    yield line("Peak concurrent requests:", float(found["max_concurrent_requests"]))
    yield line("Total token throughput (tok/s):", found["total_token_throughput"])


def latencies(found: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> Iterator[str]:
    for key in metrics:
        heading, name = SECTIONS[key]
        yield title(heading, "-")
        yield line(f"Mean {name} (ms):", found[f"mean_{key}_ms"])
        yield line(f"Median {name} (ms):", found[f"median_{key}_ms"])
        for share in percentiles:
            yield line(f"P{share:g} {name} (ms):", found[f"p{share:g}_{key}_ms"])


def speculation(found: Mapping[str, Any]) -> Iterator[str]:
    if "spec_decode_num_drafts" not in found:
        return
    yield title("Speculative Decoding", "-")
    for name, key in SPECULATION:
        yield line(name, found[f"spec_decode_{key}"])
    yield "Per-position acceptance (%):"
    for place, rate in enumerate(found["spec_decode_per_position_acceptance_rates"]):
        yield line(f"  Position {place}:", rate * 100)


def client(found: Mapping[str, Any]) -> Iterator[str]:
    """How late the generator was."""
    yield title("This client", "-")
    yield line("P99 lateness of sending (ms):", found["p99_generator_lag_ms"])
    yield line("Max lateness of sending (ms):", found["max_generator_lag_ms"])
    yield line("P99 lateness of reading (ms):", found["p99_loop_lag_ms"])
    yield line("Tokens a message:", found["tokens_per_message"])


def title(text: str, fill: str) -> str:
    return f"{text:{fill}^{WIDTH}}"


def line(name: str, value: float | None) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{name:<{NAME_WIDTH}} {shown}"
