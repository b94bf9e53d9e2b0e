"""Health, reflection, start and stop."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from serving import Served, eventually, serving

from jaxinfer.errors import InvalidConfig
from serve.client import Client
from serve.server import Server, ServerConfig

NAME = "jaxinfer.v1.GenerationService"
VLLM = "vllm.grpc.engine.VllmEngine"
Status = health_pb2.HealthCheckResponse
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def health(address: str, name: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name)).status


@pytest.mark.parametrize("name", ["", NAME, VLLM])
def test_not_serving_until_ready(name: str):
    with serving(None) as served:
        assert health(served.server.address, name) == Status.NOT_SERVING
        with pytest.raises(TimeoutError, match=r"not ready after 0\.1 s"):
            served.client.wait_ready(0.1)
        served.core = make_core(CountingEngine(pace=0.001))
        served.call(served.server.ready(served.core))
        assert health(served.server.address, name) == Status.SERVING
        served.client.wait_ready(0.1)


def test_calls_before_ready_are_refused():
    with serving(None) as served:
        client = served.client
        calls = [lambda: client.generate("a"), lambda: list(client.stream("a")), lambda: client.tokenize("a"),
                 lambda: client.detokenize([1]), client.model_info, client.load]
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is UNAVAILABLE and "still loading" in caught.value.details()


def test_health_of_an_unknown_service(served: Served):
    with pytest.raises(grpc.RpcError) as caught:
        health(served.server.address, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watchers_see_the_stop_first():
    with serving(make_core(CountingEngine()), drain_seconds=0.3) as served, \
            grpc.insecure_channel(served.server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == Status.SERVING
        stream = served.client.stream("ab", max_tokens=100)
        eventually(lambda: served.engine.rows)
        stopping = served.start(served.server.stop())
        assert next(watch).status == Status.NOT_SERVING
        assert served.engine.rows and not stopping.done()  # and yet the running request goes on
        assert health(served.server.address) == Status.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            served.client.generate("ab")
        assert caught.value.code() is UNAVAILABLE and "stopping" in caught.value.details()
        served.engine.step()
        assert next(iter(stream)).text == "c"
        assert stopping.result(timeout=5) is False
        with pytest.raises(grpc.RpcError) as cut:
            list(stream)
        assert cut.value.code() is UNAVAILABLE and "stopped before" in cut.value.details()
        assert served.engine.closed and not served.engine.rows


def test_an_endless_watch_does_not_delay_the_stop():
    with serving(make_core(CountingEngine()), drain_seconds=30) as served, \
            grpc.insecure_channel(served.server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == Status.SERVING
        began = time.monotonic()
        assert served.call(served.server.stop()) is True
        assert time.monotonic() - began < 2


def test_reflection_lists_and_describes_the_services(served: Served):
    with grpc.insecure_channel(served.server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services=""),
                 reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME)]
        listed, described = stub.ServerReflectionInfo(iter(asked))
    assert {service.name for service in listed.list_services_response.service} == {
        NAME, VLLM, "jaxinfer.v1.DraftService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    file = descriptor_pb2.FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert [method.name for method in file.service[0].method] == [
        "Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModelInfo", "GetLoad"]


@pytest.mark.parametrize("statement", [
    "sys.modules['smg_grpc_proto'] = None",
    "runtime_version.ValidateProtobufRuntimeVersion = too_old",
])
def test_without_fitting_stubs_there_is_no_service_for_gateways(statement: str, repository: Path):
    script = f"""
import sys
from google.protobuf import runtime_version
import grpc
from serve.server import register_gateway_services
def too_old(*args):
    raise runtime_version.VersionError("too old")
{statement}
async def main():
    print(register_gateway_services(None, grpc.aio.server()))
import asyncio
asyncio.run(main())
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert found.stdout == "()\n"
    assert ("do not fit" in found.stderr) == ("too_old" in statement)


def test_a_taken_port_is_refused(served: Served):
    async def start() -> None:
        await Server(ServerConfig(port=served.server.port)).start()

    with pytest.raises(InvalidConfig, match=f"port: cannot listen on 127.0.0.1:{served.server.port}"):
        served.call(start())


@pytest.mark.parametrize("port", ["taken", "free"])
@pytest.mark.parametrize("host", ["n" * 64, "192.0.2.1", "[::1]", "127.0.0.1:1", "\ud800"])
def test_a_bad_host_is_called_the_host(served: Served, host: str, port: str):
    async def start() -> None:
        chosen = served.server.port if port == "taken" else 0
        await Server(ServerConfig(host=host, port=chosen, insecure=True)).start()

    with pytest.raises(InvalidConfig) as caught:
        served.call(start())
    assert str(caught.value).startswith(f"host: cannot listen on {host!r}: not a name or an IP address")


# ---- in a process of its own


@contextlib.contextmanager
def process(repository: Path, load_seconds: float = 0.0, drain_seconds: float = 20.0, dies_after: float = 0.0
            ) -> Iterator[subprocess.Popen]:
    environment = os.environ | {"PYTHONPATH": str(repository)}
    script = Path(__file__).with_name("serve_counting.py")
    command = [sys.executable, str(script), str(load_seconds), str(drain_seconds), str(dies_after)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as found:
        try:
            yield found
        finally:
            found.kill()


def address_of(server: subprocess.Popen) -> str:
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("starting on 127.0.0.1:") and line.endswith("; loading the model\n"), line
    return line.removeprefix("starting on ").partition(";")[0]


@contextlib.contextmanager
def watching_health(address: str) -> Iterator[list[tuple[float, int]]]:
    """What health says from now on, and when."""
    seen: list[tuple[float, int]] = []

    def watch(responses: Any) -> None:
        with contextlib.suppress(grpc.RpcError):  # it ends with the server
            for response in responses:
                seen.append((time.monotonic(), response.status))

    with grpc.insecure_channel(address) as channel:
        responses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        thread = threading.Thread(target=watch, args=(responses,))
        thread.start()
        yield seen
        responses.cancel()
        thread.join()


def test_a_dead_engine_ends_the_service(repository: Path):
    with process(repository, dies_after=1.0) as server:
        address = address_of(server)
        with Client(address) as client, watching_health(address) as seen:
            client.wait_ready(10)
            with pytest.raises(grpc.RpcError) as caught:
                list(client.stream("ab", max_tokens=100_000))
            assert caught.value.code() is UNAVAILABLE
            died = time.monotonic()
            eventually(lambda: seen[-1][1] == Status.NOT_SERVING and seen[-1][0] - died < 1)
        output, _ = server.communicate(timeout=10)
        assert server.returncode == 1
        assert "the engine has died" in output


def test_from_bound_to_drained(repository: Path):
    with process(repository, load_seconds=0.3) as server:
        address = address_of(server)
        assert health(address) == Status.NOT_SERVING
        with Client(address) as client:
            client.wait_ready(10)
            assert server.stdout is not None
            ready = server.stdout.readline()
            assert ready.startswith(f"ready on {address}: counting (counting, 1 parameters, int32), after"), ready
            assert ready.endswith(f"; serves {NAME}, jaxinfer.v1.DraftService, {VLLM}\n"), ready
            stream = iter(client.stream("ab", max_tokens=60))
            first = next(stream)
            server.send_signal(signal.SIGTERM)
            eventually(lambda: health(address) == Status.NOT_SERVING)
            rest = list(stream)
        text = first.text + "".join(delta.text for delta in rest)
        assert len(text.encode()) >= 60 and rest[-1].finish_reason == "length"
        assert server.wait(5) == 0
        assert server.stderr is not None and server.stderr.read() == ""


def test_the_second_signal_stops_at_once(repository: Path):
    with process(repository) as server, Client(address_of(server)) as client:
        client.wait_ready(10)
        stream = iter(client.stream("ab", max_tokens=100_000))
        next(stream)
        server.send_signal(signal.SIGINT)
        eventually(lambda: health(client.address) == Status.NOT_SERVING)
        assert next(stream).text
        server.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is UNAVAILABLE
        assert server.wait(5) == 1


def test_a_stop_while_loading(repository: Path):
    with process(repository, load_seconds=60) as server:
        address = address_of(server)
        assert health(address) == Status.NOT_SERVING
        server.send_signal(signal.SIGTERM)
        assert server.wait(5) == 0


def test_a_model_that_cannot_be_loaded(repository: Path):
    with process(repository, load_seconds=-1) as server:
        address_of(server)
        output, errors = server.communicate(timeout=10)
        assert server.returncode == 1 and "ValueError: no such model" in errors
        assert output == ""  # nothing after the line that it starts: it was never ready
