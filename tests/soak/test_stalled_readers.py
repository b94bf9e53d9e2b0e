"""Clients that ask for much and read nothing. A server whose tokens cost nothing, so that they come fast."""

import ast
import contextlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from canary import Canary
from figures import Figures
from server_process import ServerProcess, in_environment, running

FOLDER = Path(__file__).parent
MB = 1_000_000
TOKENS = 100_000
"""Of each stream: far more than is read."""
PROCESSES = 4


@pytest.fixture(scope="module")
def stall_timeout(is_full: bool) -> float:
    return 20.0 if is_full else 2.0


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, stall_timeout: float) -> Iterator[ServerProcess]:
    script = str(FOLDER / "serve_many.py")
    with running((script, str(stall_timeout)), tmp_path_factory.mktemp("many")) as server:
        yield server
        assert server.process.poll() is None
        assert not server.lines("Traceback")


@contextlib.contextmanager
def stopped_clients(address: str, streams: int, seconds: float) -> Iterator[list[subprocess.Popen[str]]]:
    """PROCESSES clients with their share of the streams, stopped by the system. seconds: their own deadline."""
    command = [sys.executable, str(FOLDER / "stalled_client.py"), address, str(streams // PROCESSES), str(TOKENS),
               str(seconds)]
    clients = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                env=in_environment()) for _ in range(PROCESSES)]
    try:
        for client in clients:
            assert client.stdout is not None and client.stdout.readline() == "begun\n"
            client.send_signal(signal.SIGSTOP)
        yield clients
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def test_stalled_streams(many: ServerProcess, stall_timeout: float, count, figures: Figures):
    """The engine goes on, others see nothing, memory stays bounded, and the streams are ended."""
    streams, before, most, limit = count(60, 1000), many.memory(), 0, 5 * stall_timeout + 60
    canary = Canary(many.address, tokens=1000)  # ten steps
    with canary.beside() as paced, stopped_clients(many.address, streams, 2 * limit) as clients:
        began, steps = time.monotonic(), many.metrics()['jaxinfer_steps_total{kind="decode"}']
        while (running_now := many.metrics()["jaxinfer_requests_running"]) > 1:
            most = max(most, many.memory())
            assert time.monotonic() - began < limit, f"{running_now} still run"
            time.sleep(0.1)
        seconds = time.monotonic() - began
        steps_a_second = (many.metrics()['jaxinfer_steps_total{kind="decode"}'] - steps) / seconds
        ended = ends_of(clients)
    growth = (most - before) / MB
    figures(streams=streams, processes=PROCESSES, memory_growth_MB=growth, all_ended_after_s=seconds,
            stall_timeout_s=stall_timeout, steps_per_s=steps_a_second, ends=dict(ended), canary_answers=paced.answers,
            canary_p99_ms=paced.p99_ms(), canary_quiet_p99_ms=canary.quiet.p99_ms())
    assert ended.keys() <= {"STALLED", "UNAVAILABLE"} and ended.total() == streams
    assert growth < max(300 * streams / 1000, 40)


def ends_of(clients: list[subprocess.Popen[str]]) -> Counter[str]:
    """How the streams ended, once the clients may go on."""
    found: Counter[str] = Counter()
    for client in clients:
        client.send_signal(signal.SIGCONT)
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write("\n")
        client.stdin.flush()
        found += Counter(ast.literal_eval(client.stdout.readline()))
    return found
