"""Spans of real calls: as they are made, as a collector gets them, and where there is none."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serving import Served, eventually, serving

from jaxinfer.errors import InvalidConfig
from jaxinfer.types import RequestStats
from serve import tracing
from serve.client import request_message
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc
from serve.server import Server
from serve.server_config import ServerConfig

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = ["queue", "prefill", "decode"]


class Spans:
    """What a server made, by call: the call's own span first, then what is below it."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self.tracing = tracing.Tracing(SimpleSpanProcessor(self._exporter))
        self.tracing.model = "counting"

    def wait(self, number: int) -> list[list[ReadableSpan]]:
        eventually(lambda: len(self.calls()) >= number)
        assert len(self.calls()) == number
        return self.calls()

    def calls(self) -> list[list[ReadableSpan]]:
        found: list[list[ReadableSpan]] = []
        below: list[ReadableSpan] = []
        for span in self._exporter.get_finished_spans():  # in the order of their ends, and a call is ended last
            if span.kind is SpanKind.SERVER:
                found.append([span, *below])
                below = []
            else:
                below.append(span)
        assert not below
        return found


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def traced(spans: Spans) -> Iterator[Served]:
    with serving(make_core(CountingEngine(pace=0.001, max_waiting=4))) as found:
        found.server.served.calls.observers = (spans.tracing.record,)
        yield found


def ask(served: Served, metadata: Sequence[tuple[str, str]], **options) -> None:
    """A call with metadata of its own."""
    with grpc.insecure_channel(served.server.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        stub.Generate(request_message([1, 2], {"max_tokens": 2, **options}), metadata=metadata)


def attributes(span: ReadableSpan) -> dict:
    return dict(span.attributes or {})


def test_where_the_model_lies_is_not_told(spans: Spans):
    core = make_core(CountingEngine())
    with serving(None) as served:
        served.server.tracing = spans.tracing
        served.call(served.server.ready(replace(core, info=replace(core.info, name="/home/somebody/target"))))
    assert spans.tracing.model == "target"


def test_an_answered_request(traced: Served, spans: Spans):
    traced.client.generate([1] * 8, max_tokens=3, temperature=0.5, top_p=0.9, top_k=7, seed=5, n=2, request_id="mine",
                           presence_penalty=0.5, frequency_penalty=0.25)
    ((call, *below),) = spans.wait(1)
    assert (call.name, call.kind, call.parent) == ("jaxinfer.v1.GenerationService/Generate", SpanKind.SERVER, None)
    assert call.status.status_code is StatusCode.UNSET
    found = attributes(call)
    assert 0 < found.pop("gen_ai.response.time_to_first_chunk") < 10
    assert found == {
        "rpc.system.name": "grpc", "rpc.method": "jaxinfer.v1.GenerationService/Generate",
        "rpc.response.status_code": "OK", "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "jaxinfer", "gen_ai.request.model": "counting", "gen_ai.response.id": "mine",
        "gen_ai.request.max_tokens": 3, "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7, "gen_ai.request.seed": 5, "gen_ai.request.choice.count": 2,
        "gen_ai.request.presence_penalty": 0.5, "gen_ai.request.frequency_penalty": 0.25,
        "gen_ai.usage.input_tokens": 8, "gen_ai.usage.cache_read.input_tokens": 4, "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("length", "length"), "jaxinfer.preemptions": 0}
    assert [span.name for span in below] == PHASES
    assert {(span.context.trace_id, span.parent.span_id) for span in below} == {
        (call.context.trace_id, call.context.span_id)}
    moments = [call.start_time, *(moment for span in below for moment in (span.start_time, span.end_time)),
               call.end_time]
    assert moments == sorted(moments)
    assert [span.end_time for span in below[:2]] == [span.start_time for span in below[1:]]
    assert call.resource.attributes["service.name"] == "jaxinfer"


def test_streams_and_the_gateways_service_have_spans_too(traced: Served, spans: Spans):
    list(traced.client.stream("ab", max_tokens=4))
    ((streamed, *below),) = spans.wait(1)
    assert streamed.name == "jaxinfer.v1.GenerationService/GenerateStream"
    assert [span.name for span in below] == PHASES
    pytest.importorskip("smg_grpc_proto")
    from vllm_peer import connected

    with connected(traced.server.address) as peer:
        list(peer.start("ab", request_id="g"))
    _, (call, *below) = spans.wait(2)
    assert call.name == "vllm.grpc.engine.VllmEngine/Generate" and attributes(call)["gen_ai.response.id"] == "g"
    assert [span.name for span in below] == PHASES


def test_the_parent_is_the_callers(traced: Served, spans: Spans):
    ask(traced, [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1")])
    ((call, *below),) = spans.wait(1)
    assert f"{call.context.trace_id:032x}" == TRACE and f"{call.parent.span_id:016x}" == PARENT
    assert call.parent.is_remote and call.context.trace_state["vendor"] == "1"
    assert {f"{span.context.trace_id:032x}" for span in below} == {TRACE}


def test_a_caller_that_keeps_no_trace_gets_none(traced: Served, spans: Spans):
    ask(traced, [("traceparent", f"00-{TRACE}-{PARENT}-00")])
    ask(traced, [])
    spans.wait(1)


@pytest.mark.parametrize("text", [
    "", "x", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", "-" * 4000,
    f"ff-{TRACE}-{PARENT}-01", f"00-{TRACE}{TRACE}-{PARENT}-01"])
def test_a_parent_that_is_none_is_ignored(traced: Served, spans: Spans, text: str):
    ask(traced, [("traceparent", text), ("tracestate", ",=," * 500)])
    ((call, *_),) = spans.wait(1)
    assert call.parent is None


def test_the_status_follows_the_calls(traced: Served, spans: Spans):
    with pytest.raises(grpc.RpcError):
        traced.client.generate([1, 2], max_tokens=-1, request_id="bad")
    traced.engine.paused = True
    stream = traced.client.stream([1, 2], max_tokens=9)
    eventually(lambda: traced.engine.rows)
    stream.cancel()
    spans.wait(2)
    with pytest.raises(grpc.RpcError):
        traced.client.generate([1, 2], timeout=0.05)
    spans.wait(3)
    (bad, *none), (left, *queued), (late, *_) = spans.wait(3)
    codes = [attributes(span)["rpc.response.status_code"] for span in (bad, left, late)]
    assert codes == ["INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED"]
    assert [span.status.status_code.name for span in (bad, left, late)] == ["UNSET", "UNSET", "ERROR"]
    assert [attributes(span).get("error.type") for span in (bad, left, late)] == [None, None, "DEADLINE_EXCEEDED"]
    assert attributes(bad)["gen_ai.response.id"] == "bad" and "gen_ai.usage.input_tokens" not in attributes(bad)
    assert not none and [span.name for span in queued] == ["queue"] and queued[0].end_time == left.end_time
    assert attributes(left)["gen_ai.response.finish_reasons"] == ()


def test_no_text_is_told(traced: Served, spans: Spans):
    list(traced.client.stream("of Zanzibar", max_tokens=5, stop=["Zanzibar"], cache_salt="Zanzibar",
                              bad_words=["Zanzibar"], request_id="i" * 200))
    traced.client.tokenize("of Zanzibar")
    ((call, *below),) = spans.wait(1)
    told = "".join(span.to_json() for span in (call, *below))
    assert "Zanzibar" not in told and "stuvw" not in told  # what the counting model says after an "r"
    assert attributes(call)["gen_ai.response.id"] == "i" * 128


def test_phases_end_where_a_request_ended():
    assert tracing.phases(RequestStats(arrival=1.0)) == [("queue", 1.0, 0.0)]
    assert tracing.phases(RequestStats(arrival=1.0, scheduled=2.0)) == [("queue", 1.0, 2.0), ("prefill", 2.0, 0.0)]
    whole = RequestStats(arrival=1.0, scheduled=2.0, first_token=3.0, finished=4.0)
    assert tracing.phases(whole) == [("queue", 1.0, 2.0), ("prefill", 2.0, 3.0), ("decode", 3.0, 4.0)]


def test_an_observer_that_fails_harms_nobody(traced: Served, spans: Spans, caplog: pytest.LogCaptureFixture):
    def fail(_: object) -> None:
        raise ValueError("broken")

    traced.server.served.calls.observers = (fail, spans.tracing.record)
    assert traced.client.generate([1, 2], max_tokens=2).token_ids == (3, 4)
    spans.wait(1)
    assert "an observer of requests failed" in caplog.text


# With a collector.


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self):
        self.resources: list = []

    def Export(self, request, context):
        self.resources += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> list:
        return [span for one in self.resources for scope in one.scope_spans for span in scope.spans]


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    server, collector = grpc.server(ThreadPoolExecutor(1)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_a_collector_gets_all_spans_at_the_stop_at_the_latest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with collecting() as (collector, endpoint):
        with serving(make_core(CountingEngine(pace=0.001)), otlp_endpoint=endpoint) as served:
            ask(served, [("traceparent", f"00-{TRACE}-{PARENT}-01")])
            list(served.client.stream("ab", max_tokens=2))
            assert not collector.spans  # they wait for more: it is asked seldom
        assert sorted(span.name for span in collector.spans) == sorted(
            [*PHASES * 2, "jaxinfer.v1.GenerationService/Generate", "jaxinfer.v1.GenerationService/GenerateStream"])
        (call,) = [span for span in collector.spans if span.parent_span_id.hex() == PARENT]
        assert call.trace_id.hex() == TRACE and call.name.endswith("/Generate")
        told = {one.key: one.value.string_value for one in call.attributes}
        assert told["gen_ai.request.model"] == "counting" and told["rpc.response.status_code"] == "OK"
        named = {one.key: one.value.string_value for one in collector.resources[0].resource.attributes}
        assert named["service.name"] == "ours"


@pytest.fixture
def silent() -> Iterator[str]:
    """A collector that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_dead_collector_costs_spans_and_nothing_else(silent: str, monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.2)
    caplog.set_level(logging.WARNING)
    with serving(make_core(CountingEngine(pace=0.001)), otlp_endpoint=silent) as served:
        for _ in range(30):  # 120 spans: many times what may wait
            assert served.client.generate([1, 2], max_tokens=2, timeout=5).token_ids == (3, 4)
        assert served.server.tracing is not None
    assert "Queue full" in caplog.text  # told, and not grown
    assert "the last spans were not taken within 0.2 s" in caplog.text
    eventually(lambda: "OtelBatchSpanRecordProcessor" not in {thread.name for thread in threading.enumerate()})


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_stop_at_once_does_not_wait_for_a_collector(silent: str, when: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 1000.0)
    with serving(make_core(CountingEngine(pace=0.001)), otlp_endpoint=silent) as served:
        assert served.client.generate([1, 2], max_tokens=2, timeout=5).token_ids == (3, 4)
        now = asyncio.Event()
        if when == "before":
            served.loop.call_soon_threadsafe(now.set)
        stopping = served.start(served.server.stop(now))
        if when == "meanwhile":
            eventually(lambda: "jaxinfer-spans" in {thread.name for thread in threading.enumerate()})
            assert not stopping.done()
            served.loop.call_soon_threadsafe(now.set)
        stopping.result(timeout=10)


def test_nobody_there_is_as_good_as_silence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with serving(make_core(CountingEngine(pace=0.001)), otlp_endpoint=endpoint) as served:
        assert served.client.generate([1, 2], max_tokens=2).token_ids == (3, 4)


# Without.


def test_off_it_is_not_even_imported(repository: Path):
    script = ("import sys\nfrom serve.server import Server\nfrom serve.server_config import ServerConfig\n"
              "import asyncio\nasync def made(): return Server(ServerConfig(port=0))\nserver = asyncio.run(made())\n"
              "assert server.tracing is None and server.served.calls.observers == ()\n"
              "sys.exit(any(name.partition('.')[0] == 'opentelemetry' for name in sys.modules))")
    assert subprocess.run([sys.executable, "-c", script], cwd=repository, timeout=60, check=False,
                          env={**os.environ, "PYTHONPATH": str(repository)}).returncode == 0


@pytest.mark.parametrize("missing", ["opentelemetry.context", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"])
def test_missing_packages_name_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "serve.tracing")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidConfig, match=r"otlp_endpoint: .*not installed.*pip install '\.\[otel\]'"):
        Server(ServerConfig(port=0, otlp_endpoint="http://127.0.0.1:4317"))


@pytest.mark.parametrize("endpoint", [
    "127.0.0.1:4317", "http://127.0.0.1", "http://:4317", "grpc://127.0.0.1:4317", "http://127.0.0.1:x", "",
    "http://127.0.0.1:4317/v1/traces", "http://me:secret@127.0.0.1:4317", "http://127.0.0.1:0", "http://[::1"])
def test_an_endpoint_is_a_url_with_a_port(endpoint: str):
    with pytest.raises(InvalidConfig, match="must be http://host:port or https://host:port"):
        ServerConfig(otlp_endpoint=endpoint)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:4317", "https://c.example:443/", "http://[::1]:4317"])
def test_good_endpoints(endpoint: str):
    assert ServerConfig(otlp_endpoint=endpoint).otlp_endpoint == endpoint
