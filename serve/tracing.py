"""OpenTelemetry spans of requests: one for each call that asked for tokens, below it what it waited for.

    the call       from its arrival to its status; its parent is the `traceparent` in the call's metadata
      queue        until the first of its rows was scheduled
      prefill      until the first token
      decode       until the last one

Spans are made when a call has ended, from times that are known anyway: a running request pays nothing. They leave the
process on a thread of their own. Names follow OpenTelemetry's conventions for RPC and for generative AI. Never any
text or token ids: stop strings, too, are what somebody wrote.

The packages are the extra `otel`, so this module is imported only where spans are wanted.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxinfer import __version__
from jaxinfer.types import RequestStats, SamplingParams
from serve.ended_request import EndedRequest
from serve.generation import Generation

log = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""What a stop waits for a collector; one that is gone must not hold it up."""
HURRY_SECONDS = 0.05
"""How often a stop looks whether it must not wait any more."""
EXPORT_SECONDS = 10.0
"""What sending a batch may take, retries included."""
MAX_NAME = 128
"""Characters of an id or tenant that are kept."""
TRACE_HEADERS = ("traceparent", "tracestate")
SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Statuses that make a server's span an error; the others are answers to what the client did."""
REQUEST_FIELDS = ("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
"""Fields of SamplingParams that the conventions have under the same names."""

Attributes = dict[str, Any]


class Tracing:
    """Makes spans and hands them to a processor. Lives on one event loop; `close` may be called from any thread.

    model: its name, known once it is loaded.
    """

    def __init__(self, processor: SpanProcessor, exporter: SpanExporter | None = None):
        """exporter: shut down where a flush takes too long."""
        # What the environment says (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) comes last, and so counts.
        ours = Resource({"service.name": "jaxinfer", "service.version": __version__})
        self.model = ""
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jaxinfer", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._exporter = exporter

    def record(self, ended: EndedRequest) -> None:
        """The observer that makes a request's spans."""
        end = time.time_ns()
        epoch = end - time.monotonic_ns()
        span = self._tracer.start_span(ended.method, self._parent(ended), SpanKind.SERVER, call_attributes(ended),
                                       start_time=wall(ended.began, epoch))
        if span.is_recording():
            if ended.code in SERVER_FAULTS:
                span.set_status(StatusCode.ERROR)
                span.set_attribute("error.type", ended.code)
            if ended.generation is not None:
                span.set_attributes(request_attributes(ended, ended.generation, self.model))
                self._record_phases(span, ended.generation.engine_stats(), epoch, end)
        span.end(end)

    def close(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Sends what waits, for FLUSH_SECONDS at most, and only until `hurry` says that nothing may be waited for."""
        # A daemon: the SDK's own shutdown waits for 30 s, and nothing can interrupt it but the exporter's end.
        flush = threading.Thread(target=self._provider.shutdown, name="jaxinfer-spans", daemon=True)
        flush.start()
        began = time.monotonic()
        while flush.is_alive() and not hurry() and (left := FLUSH_SECONDS - (time.monotonic() - began)) > 0:
            flush.join(min(HURRY_SECONDS, left))
        if flush.is_alive():
            log.warning("the last spans were not taken within %.1f s and are lost", time.monotonic() - began)
            if self._exporter is not None:
                self._exporter.shutdown()

    def _parent(self, ended: EndedRequest) -> Context:
        headers = {key: value for key, value in ended.metadata if key in TRACE_HEADERS}
        return self._propagator.extract(headers, Context())

    def _record_phases(self, call: Span, stats: RequestStats, epoch: int, end: int) -> None:
        below = set_span_in_context(call, Context())
        for name, began, ended in phases(stats):
            found = self._tracer.start_span(name, below, start_time=wall(began, epoch))
            found.end(wall(ended, epoch) if ended else end)


def to_collector(endpoint: str) -> Tracing:
    """Spans for a collector that takes OTLP over gRPC at `endpoint`, a URL.

    It is connected to when there is something to send. Spans that it does not take are dropped, the oldest first, once
    2,048 wait. The SDK's variables (OTEL_BSP_*, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_*) hold where nothing is said.
    """
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
    return Tracing(BatchSpanProcessor(exporter), exporter)


def wall(moment: float, epoch: int) -> int:
    """A time of time.monotonic() in nanoseconds since 1970; epoch: where that clock began."""
    return epoch + int(moment * 1e9)


def phases(stats: RequestStats) -> list[tuple[str, float, float]]:
    """Name, start and end of what a request went through, as far as it came; end 0 is the end of the call."""
    marks = (("queue", stats.arrival), ("prefill", stats.scheduled), ("decode", stats.first_token))
    reached = [(name, moment) for name, moment in marks if moment]
    ends = [moment for _, moment in reached[1:]] + [stats.finished]
    return [(name, began, ended) for (name, began), ended in zip(reached, ends, strict=True)]


def call_attributes(ended: EndedRequest) -> Attributes:
    """Of every call, whatever became of it."""
    found = {"rpc.system.name": "grpc", "rpc.method": ended.method, "rpc.response.status_code": ended.code,
             "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "jaxinfer",
             "gen_ai.response.id": ended.id[:MAX_NAME]}
    return found | ({"jaxinfer.tenant": ended.tenant[:MAX_NAME]} if ended.tenant else {})


def request_attributes(ended: EndedRequest, generation: Generation, model: str) -> Attributes:
    """Of a request that could be read."""
    stats = generation.engine_stats()
    found: Attributes = {
        "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": len(generation.request.prompt),
        "gen_ai.usage.output_tokens": generation.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": generation.num_cached_tokens,
        "gen_ai.response.finish_reasons": sorted(ended.finish().elements()),
        "jaxinfer.preemptions": stats.num_preemptions,
    }
    if stats.first_token:
        found["gen_ai.response.time_to_first_chunk"] = stats.first_token - stats.arrival
    return found | params_attributes(generation.request.params)


def params_attributes(params: SamplingParams) -> Attributes:
    values = ((name, getattr(params, name)) for name in REQUEST_FIELDS)
    found: Attributes = {f"gen_ai.request.{name}": value for name, value in values if value is not None}
    if params.top_k > 0:
        found["gen_ai.request.top_k"] = params.top_k
    if params.n > 1:
        found["gen_ai.request.choice.count"] = params.n
    return found
