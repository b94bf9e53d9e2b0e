"""Metrics over a real HTTP connection, after real calls over a real channel."""

import contextlib
import dataclasses
import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from counting_engine import CountingEngine, make_core
from prometheus_client.parser import text_string_to_metric_families
from serving import Served, eventually, serving

from jaxinfer.errors import InvalidConfig
from serve import metrics_server
from serve.client import Client, Envelope, request_message
from serve.metrics_server import MAX_CONNECTIONS
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc
from serve.server import Server, ServerConfig

PROMPT = "tell nobody of Zanzibar"
ANYWHERE = "0.0.0.0"  # noqa: S104 (what is tested is when it may be)
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def measured() -> Iterator[Served]:
    with serving(make_core(CountingEngine(pace=0.001)), metrics_port=0) as found:
        yield found


@contextlib.contextmanager
def measuring(**settings) -> Iterator[Served]:
    """A service of its own, whose engine steps when the test says so."""
    with serving(make_core(CountingEngine(max_waiting=4)), metrics_port=0, **settings) as found:
        yield found


def text_of(served: Served) -> str:
    assert served.server.metrics is not None
    with urllib.request.urlopen(served.server.metrics.url, timeout=5) as answer:  # noqa: S310 (our own address)
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def series(served: Served) -> Series:
    return {(one.name, frozenset(one.labels.items())): one.value
            for family in text_string_to_metric_families(text_of(served)) for one in family.samples}


def value(found: Series, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def answer_of(served: Served, method: str, path: str) -> int:
    assert served.server.metrics is not None
    connection = http.client.HTTPConnection("127.0.0.1", served.server.metrics.port, timeout=5)
    connection.request(method, path)
    status = connection.getresponse().status
    connection.close()
    return status


def test_streams_are_counted():
    with measuring() as served:
        stream = served.client.stream([1] * 8, max_tokens=3, temperature=0)
        eventually(lambda: served.engine.rows)
        assert value(series(served), "jaxinfer_requests_running") == 1
        for _ in range(3):
            served.engine.step()
        assert sum(len(delta.token_ids) for delta in stream) == 3
        found = series(served)
    assert value(found, "jaxinfer_ready") == 1
    assert value(found, "jaxinfer_samples_finished_total", reason="length") == 1
    assert value(found, "jaxinfer_generated_tokens_total") == 3
    assert value(found, "jaxinfer_prefix_query_tokens_total") == 8
    assert value(found, "jaxinfer_prefix_hit_tokens_total") == 4
    assert value(found, "jaxinfer_pages", state="used") == 3
    assert value(found, "jaxinfer_pages", state="free") == 59
    assert value(found, "jaxinfer_idle_leaks_total") == 0
    assert value(found, "jaxinfer_steps_total", kind="decode") == 3
    for name, times in (("queue", 1), ("time_to_first_token", 1), ("inter_token", 2), ("request", 1), ("step", 3),
                        ("step_host", 3)):
        assert value(found, f"jaxinfer_{name}_seconds_count") == times
        assert value(found, f"jaxinfer_{name}_seconds_bucket", le="+Inf") == times


def test_rejects_cancels_and_deadlines_are_counted_by_their_status():
    with measuring() as served:
        served.client.tokenize("a")
        with pytest.raises(grpc.RpcError):
            served.client.generate("a", max_tokens=-1)
        streams = [served.client.stream([1, 2], max_tokens=9) for _ in range(4)]
        eventually(lambda: len(served.engine.rows) == 4)
        with pytest.raises(grpc.RpcError):
            served.client.generate([1, 2])
        for stream in streams[:3]:
            stream.cancel()
        with pytest.raises(grpc.RpcError):
            served.client.generate([1, 2], timeout=0.05)
        eventually(lambda: value(series(served), "jaxinfer_calls_total", code="DEADLINE_EXCEEDED"))
        eventually(lambda: value(series(served), "jaxinfer_calls_total", code="CANCELLED") == 3)
        found = series(served)
    assert value(found, "jaxinfer_calls_total", code="OK") == 1
    assert value(found, "jaxinfer_calls_total", code="INVALID_ARGUMENT") == 1
    assert value(found, "jaxinfer_calls_total", code="RESOURCE_EXHAUSTED") == 1
    assert value(found, "jaxinfer_samples_finished_total", reason="abort") == 4


def test_calls_refused_unread_are_counted(tmp_path):
    (tmp_path / "tokens").write_text("tenant 0123456789abcdef\n")
    with measuring(token_file=str(tmp_path / "tokens")) as served:
        with pytest.raises(grpc.RpcError):
            served.client.tokenize("a")
        assert value(series(served), "jaxinfer_calls_total", code="UNAUTHENTICATED") == 1
    with measuring(max_calls=1) as served:
        stream = served.client.stream([1, 2], max_tokens=9)
        eventually(lambda: served.engine.rows)
        with pytest.raises(grpc.RpcError):
            served.client.tokenize("a")
        assert value(series(served), "jaxinfer_calls_total", code="RESOURCE_EXHAUSTED") == 1
        stream.cancel()
    with measuring() as served, grpc.insecure_channel(served.server.address) as channel:
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/jaxinfer.v1.GenerationService/Generate")(b"\xff", timeout=5)
        assert value(series(served), "jaxinfer_calls_total", code="INVALID_ARGUMENT") == 1


def test_nothing_grows_with_what_clients_send_and_nothing_of_it_is_shown(tmp_path: Path):
    """10,002 values, no two alike: 3,334 requests, each with a name, a user and a salt of its own."""
    numbers = range(3334)
    lines = (f"user-{number}-Zanzibar {number:016d}\n" for number in numbers)
    (tmp_path / "tokens").write_text("".join(lines))
    core = make_core(CountingEngine(pace=0.001))
    with (serving(core, metrics_port=0, token_file=str(tmp_path / "tokens")) as served,
          grpc.insecure_channel(served.server.address) as channel):
        generate = pb_grpc.GenerationServiceStub(channel).Generate

        def ask(number: int) -> None:
            given: Envelope = {"max_tokens": 1, "request_id": f"id-{number}-Zanzibar", "priority": number,
                               "cache_salt": f"salt-{number}-Zanzibar"}
            message = request_message(f"{PROMPT} {number}", given)
            generate(message, metadata=[("authorization", f"Bearer {number:016d}")], timeout=30)

        ask(0)
        before = set(series(served))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, numbers[1:]))
        found = series(served)
        assert set(found) == before
        assert value(found, "jaxinfer_samples_finished_total", reason="length") == len(numbers)
        assert "Zanzibar" not in text_of(served) and "user-" not in text_of(served)


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/metrics", 200), ("GET", "/metrics?x=1", 200), ("GET", "/", 404), ("GET", "/metrics/x", 404),
    ("POST", "/metrics", 501), ("DELETE", "/metrics", 501)])
def test_only_get_of_one_path_is_answered(measured: Served, method: str, path: str, status: int):
    assert answer_of(measured, method, path) == status


def test_it_answers_while_the_engine_and_the_loop_stand_still():
    with measuring() as served:
        goes_on = threading.Event()
        served.loop.call_soon_threadsafe(goes_on.wait, 5)
        with served.engine._lock:  # as a step that takes long
            assert answer_of(served, "GET", "/metrics") == 200
        assert not goes_on.is_set()
        goes_on.set()


def test_connections_that_say_nothing_do_not_keep_others_out(measured: Served):
    assert measured.server.metrics is not None
    address = "127.0.0.1", measured.server.metrics.port
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(address, timeout=5))
        assert answer_of(measured, "GET", "/metrics") == 200


@pytest.mark.parametrize("is_secure", [False, True])
def test_slow_connections_do_not_keep_others_out(is_secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each says a byte in time, again and again."""
    monkeypatch.setattr(metrics_server, "TIMEOUT_SECONDS", 0.3)
    done, issued = threading.Event(), Authority(tmp_path, "own").issue("server")
    trusting = ssl.create_default_context(cafile=str(issued.ca))
    settings = {"tls_cert": str(issued.cert), "tls_key": str(issued.key), "metrics_host": ANYWHERE}

    def dribble(connections: list[socket.socket]) -> None:
        while not done.wait(0.02):
            for one in tuple(connections):
                with contextlib.suppress(OSError):
                    one.sendall(b"x")

    with measuring(**(settings if is_secure else {})) as served, contextlib.ExitStack() as stack:
        assert served.server.metrics is not None
        address = "127.0.0.1", served.server.metrics.port
        slow: list[socket.socket] = []
        thread = threading.Thread(target=dribble, args=(slow,))
        thread.start()
        try:
            for _ in range(MAX_CONNECTIONS):
                one = socket.create_connection(address, timeout=5)
                one = trusting.wrap_socket(one, server_hostname="127.0.0.1") if is_secure else one
                stack.enter_context(one).sendall(b"GET /metrics?")
                slow.append(one)
            eventually(lambda: is_scraped(served, issued.ca))
        finally:
            done.set()
            thread.join()


def is_scraped(served: Served, ca: Path) -> bool:
    assert served.server.metrics is not None
    url = served.server.metrics.url.replace(ANYWHERE, "127.0.0.1")
    trusting = ssl.create_default_context(cafile=str(ca)) if url.startswith("https") else None
    try:
        with urllib.request.urlopen(url, timeout=5, context=trusting) as answer:  # noqa: S310 (our own address)
            return b"jaxinfer_ready" in answer.read()
    except OSError:
        return False


def test_bad_certificate_files_leave_the_last_ones_in_force(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    issued, stranger = Authority(tmp_path, "own").issue("server"), Authority(tmp_path, "new").issue("server")
    with measuring(tls_cert=str(issued.cert), tls_key=str(issued.key), metrics_host=ANYWHERE) as served:
        issued.cert.write_text("garbage")
        assert is_scraped(served, issued.ca)
        assert caplog.text.count("the last certificates stay in force: tls_cert: ") == 1
        locked = ("openssl", "ec", "-in", issued.key, "-out", issued.key, "-aes128", "-passout", "pass:secret")
        subprocess.run(locked, check=True, capture_output=True)
        shutil.copy(stranger.cert, issued.cert)
        assert is_scraped(served, issued.ca)
        assert "the key has a password" in caplog.text
        issued.replace(stranger)
        assert is_scraped(served, stranger.ca) and not is_scraped(served, issued.ca)


def test_a_server_that_loads_says_so():
    with serving(None, metrics_port=0) as served:
        found = series(served)
    assert value(found, "jaxinfer_ready") == 0
    assert not [name for name, _ in found if name.startswith("jaxinfer_requests")]


def test_a_server_that_drains_says_so():
    with measuring(drain_seconds=5.0) as served:
        stream = served.client.stream([1, 2], max_tokens=2, temperature=0)
        eventually(lambda: served.engine.rows)
        stopping = served.start(served.server.stop())
        eventually(lambda: value(series(served), "jaxinfer_ready") == 0)
        assert value(series(served), "jaxinfer_requests_running") == 1
        for _ in range(2):
            served.engine.step()
        assert sum(len(delta.token_ids) for delta in stream) == 2
        stopping.result(timeout=10)


def test_where_the_model_lies_is_not_shown():
    core = make_core(CountingEngine())
    core = dataclasses.replace(core, info=dataclasses.replace(core.info, name="/home/somebody/target"))
    with serving(core, metrics_port=0, metrics_compat="vllm") as served:
        names = {dict(labels)["model_name"] for _, labels in series(served) if "model_name" in dict(labels)}
        assert names == {"target"} and "somebody" not in text_of(served)


def test_without_a_port_there_are_no_metrics(stepped: Served):
    assert stepped.server.metrics is None


def test_the_port_is_closed_at_the_end():
    with measuring() as served:
        assert served.server.metrics is not None
        port = served.server.metrics.port
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_port_in_use_is_refused(measured: Served):
    assert measured.server.metrics is not None
    taken = measured.server.metrics.port

    async def start() -> None:
        await Server(ServerConfig(port=0, metrics_port=taken)).start()
    with pytest.raises(InvalidConfig, match="metrics_port"):
        measured.call(start())


@pytest.mark.parametrize("settings", [
    {"metrics_port": 70000}, {"metrics_port": -1}, {"metrics_host": ""}, {"metrics_host": ANYWHERE}])
def test_settings_that_cannot_be_are_refused(settings: dict):
    with pytest.raises(InvalidConfig, match="metrics_"):
        ServerConfig(**settings)


def test_metrics_for_everybody_are_warned_of():
    open_to_all = ServerConfig(metrics_port=0, metrics_host=ANYWHERE, insecure=True)
    assert any("metrics" in one for one in open_to_all.warnings())
    assert not ServerConfig(metrics_port=0).warnings()


def test_metrics_for_other_machines_are_encrypted(tmp_path):
    issued = Authority(tmp_path, "own").issue("server")
    trusting = ssl.create_default_context(cafile=str(issued.ca))
    core = make_core(CountingEngine())
    with serving(core, connect={"tls": issued.trusted()}, metrics_port=0, metrics_host=ANYWHERE,
                 tls_cert=str(issued.cert), tls_key=str(issued.key)) as served:
        assert served.server.metrics is not None and served.server.metrics.url.startswith("https://")
        url = f"https://127.0.0.1:{served.server.metrics.port}/metrics"
        with urllib.request.urlopen(url, timeout=5, context=trusting) as answer:
            assert b"jaxinfer_ready 1" in answer.read()
        with pytest.raises(OSError):
            urllib.request.urlopen(url.replace("https", "http"), timeout=5)  # noqa: S310 (our own address)


def test_clients_are_unchanged_by_metrics(measured: Served):
    with Client(measured.server.address) as client:
        assert len(client.generate([1, 2], max_tokens=3).token_ids) == 3
