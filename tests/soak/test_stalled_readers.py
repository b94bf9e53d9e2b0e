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
from memory import memory_of
from server_process import ServerProcess, in_environment, running

FOLDER = Path(__file__).parent
MB = 1_000_000
TOKENS = 100_000
"""Of each stream: far more than is read."""
PROCESSES = 4
BEGUN, LATE = "jaxinfer_queue_seconds_count", 'jaxinfer_calls_total{code="DEADLINE_EXCEEDED"}'


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
def stopped_clients(server: ServerProcess, streams: int, seconds: float) -> Iterator[list[subprocess.Popen[str]]]:
    """PROCESSES clients with their share of the streams, stopped by the system once all have begun. seconds: their own
    deadline.
    """
    command = [sys.executable, str(FOLDER / "stalled_client.py"), server.address, str(streams // PROCESSES),
               str(TOKENS), str(seconds)]
    wanted = server.metrics()[BEGUN] + streams
    clients = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                env=in_environment()) for _ in range(PROCESSES)]
    try:
        for client in clients:
            assert client.stdout is not None and client.stdout.readline() == "begun\n"
        while server.metrics()[BEGUN] < wanted:  # the canary's count too, so it may be a little early
            time.sleep(0.05)
        for client in clients:
            client.send_signal(signal.SIGSTOP)
        yield clients
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def test_stalled_streams(many: ServerProcess, stall_timeout: float, count, figures: Figures):
    """The engine goes on, others see nothing, memory stays bounded, and the streams are ended."""
    streams, before, limit = count(60, 1000), many.memory(), 5 * stall_timeout + 120
    canary, late = Canary(many.address, tokens=1000), many.metrics()[LATE]  # ten steps
    began = time.monotonic()
    with canary.beside() as paced, memory_of(many) as samples, stopped_clients(many, streams, 2 * limit) as clients:
        while (ended := many.metrics()[LATE] - late) < streams:
            assert time.monotonic() - began < limit, f"{ended} of {streams} streams were ended"
            time.sleep(0.1)
        seconds = time.monotonic() - began
        told = ends_of(clients)
    growth = (max(resident for _, resident in samples) - before) / MB
    figures(streams=streams, processes=PROCESSES, memory_growth_MB=growth, ended=int(ended), all_ended_after_s=seconds,
            stall_timeout_s=stall_timeout, clients_saw=dict(told), canary_answers=paced.answers,
            canary_p99_ms=paced.p99_ms(), canary_quiet_p99_ms=canary.quiet.p99_ms())
    assert many.metrics()["jaxinfer_requests_running"] == 0
    # What a client sees that read nothing until its stream was gone is the transport's to choose.
    assert told.keys() <= {"STALLED", "CANCELLED", "UNAVAILABLE"} and told.total() == streams
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
