"""A server that gets more than it can take, and one that is told to stop. One process of the demo model."""

import signal
import time
from typing import Any

import flood_load
import grpc
import pytest
from canary import Canary, quantile
from figures import Figures
from grpc_health.v1 import health_pb2, health_pb2_grpc
from quiet import wait_idle
from reading import Reading
from server_process import ROWS, ServerProcess

WAITING = 16
DEMO_OPTIONS = ("--max-waiting", str(WAITING), "--drain-seconds", "120")
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_flood(demo: ServerProcess, canary: Canary, beside, count, is_full: bool, figures: Figures):
    """What does not fit is refused at once, with a time to come back; what was taken waits no longer than the queue."""
    with canary.beside() as paced:
        found = beside.submit(flood_load.flood, demo.address, count(3, 60), 10.0, is_full).result()
    wait_idle(demo)
    # By Little's law: all that may wait and run before it, at the pace at which they were answered.
    bound = (WAITING + ROWS) / max(found.per_second, 0.1)
    reject, first = quantile(found.rejects, 0.99) * 1000, quantile(found.first, 0.99)
    figures(capacity_per_s=found.capacity, rate_per_s=found.rate, codes=dict(found.codes), rejects_p99_ms=reject,
            rejects_without_hint=found.without_hint, ttft_p99_s=first, queue_bound_s=bound, recovery_s=found.recovery,
            canary_answers=paced.answers, canary_refused=paced.refused, canary_p99_ms=paced.p99_ms(),
            canary_quiet_p99_ms=canary.quiet.p99_ms())
    assert found.codes.keys() == {"OK", "RESOURCE_EXHAUSTED"}
    assert found.codes["RESOURCE_EXHAUSTED"] > 2 * found.codes["OK"]
    assert found.without_hint == 0
    if is_full:
        assert found.rate > 8 * found.capacity, "the client could not send as fast"
        assert reject < 50 and first < 1.5 * bound and found.recovery <= 5


def test_draining(demo: ServerProcess, count, figures: Figures):
    """After SIGTERM health says so at once, new requests are refused, those that run or wait finish, and the end is
    clean. The server of this module ends here.
    """
    streams, tokens = count(8, 16), 200
    with demo.client() as client, grpc.insecure_channel(demo.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=200)
        assert next(watch).status != NOT_SERVING
        found = [Reading(client.stream("import", max_tokens=tokens, temperature=0, ignore_eos=True, timeout=200))
                 for _ in range(streams)]
        while num_in(demo) < streams:  # one that comes after the signal is refused, and should be
            time.sleep(0.01)
        demo.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert next(watch).status == NOT_SERVING
        told = time.monotonic() - began
        assert any(stream.is_alive() for stream in found), "they ended too soon to show anything"
        with pytest.raises(grpc.RpcError) as refused:
            client.generate("a", max_tokens=1, timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        for stream in found:
            stream.join()
        finished = time.monotonic() - began
        aborted = [stream.error or len(stream.ids) for stream in found if len(stream.ids) != tokens]
        code = demo.process.wait(30)
    figures(streams=streams, aborted=len(aborted), not_serving_after_ms=told * 1000, streams_took_s=finished,
            exit_code=code)
    assert not aborted
    assert told < 1.0
    assert code == 0


def num_in(server: ServerProcess) -> float:
    """Requests that run or wait."""
    found = server.metrics()
    return found["jaxinfer_requests_running"] + found["jaxinfer_requests_waiting"]
