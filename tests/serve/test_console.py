"""What a server's process says, and that nobody has to listen."""

import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import eventually

from jaxinfer.errors import InvalidConfig
from serve import request_log
from serve.client import Client
from serve.console import Console, LineHandler
from serve.line_writer import LineWriter
from serve.server_config import ServerConfig

FOLDER = Path(__file__).parent
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.]+: .+")


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A small one: its ends to read and to write."""
    ends = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # of Linux
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """The end to write to of one that nobody reads."""
    with pipe() as (_, end):
        fill(end)
        yield end


def fill(end: int) -> int:
    """Writes to a pipe as much as it takes; returns how many bytes that is."""
    size = 0
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            size += os.write(end, b"." * 1024)
    os.set_blocking(end, True)
    return size


@contextlib.contextmanager
def process(script: str, *arguments: str, **streams) -> Iterator[subprocess.Popen]:
    command = [sys.executable, FOLDER / script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    with subprocess.Popen(command, text=True, env=environment, **streams) as found:
        try:
            yield found
        finally:
            found.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


# A server.


@pytest.mark.parametrize("blocked", [["stderr"], ["stdout", "stderr"]], ids=" and ".join)
def test_a_server_whose_output_nobody_reads_serves_and_stops(blocked: list[str]):
    """Both of its streams are one full pipe where a container's log stands still."""
    port = free_port()
    settings = json.dumps({"port": port, "request_log": True, "drain_seconds": 1})
    with full_pipe() as end, process("serve_logging.py", settings, **dict.fromkeys(blocked, end)) as server:
        with Client(f"127.0.0.1:{port}") as client:
            client.wait_ready(20)
            for _ in range(50):
                assert client.generate([1], max_tokens=2, temperature=0, timeout=10).token_ids == (2, 3)
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


def test_a_process_whose_engine_hangs_for_good_ends_although_nobody_reads_its_log():
    with full_pipe() as end, process("serve_hanging.py", "0.4", "1", stdout=subprocess.PIPE, stderr=end) as server:
        output, _ = server.communicate(timeout=30)
        assert server.returncode == 1 and "ready on" in output


@pytest.mark.parametrize("level", ["debug", "warning"])
def test_lines_have_time_level_and_logger_and_the_request_log_is_pure(level: str):
    settings = json.dumps({"port": 0, "request_log": True, "log_level": level})
    loggers = ("serve.of_ours", "of_others")
    with process("serve_logging.py", settings, *loggers, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout is not None
        address = server.stdout.readline().removeprefix("starting on ").partition(";")[0]
        with Client(address) as client:
            client.wait_ready(20)
            client.generate([1], max_tokens=2, request_id="mine")
        server.send_signal(signal.SIGTERM)
        output, errors = server.communicate(timeout=20)
        assert server.returncode == 0 and output.startswith("ready on") and "stopping" in output
    lines = errors.splitlines()
    (request,) = [json.loads(line) for line in lines if line.startswith("{")]
    assert request["id"] == "mine"
    others = [line for line in lines if not line.startswith("{")]
    assert [line for line in others if not LINE.fullmatch(line)] == []
    heard = [tuple(line.split()[1:3]) for line in others if "from " in line]
    ours = [("WARNING", "serve.of_ours:")]
    ours = [("DEBUG", "serve.of_ours:"), ("INFO", "serve.of_ours:"), *ours] if level == "debug" else ours
    assert heard == [*ours, ("WARNING", "of_others:")]


def test_a_level_that_is_none():
    with pytest.raises(InvalidConfig, match="log_level: must be one of debug, info, warning, error, critical, got 'x'"):
        ServerConfig(log_level="x")


# In an application of its own.


def handlers() -> list[tuple[list[logging.Handler], int, bool]]:
    loggers = [logging.getLogger(name) for name in (None, "serve", "jaxinfer", request_log.log.name)]
    return [(list(one.handlers), one.level, one.propagate) for one in loggers]


def test_an_application_that_has_configured_logging_keeps_it():
    """pytest's own handlers are at the root."""
    before = handlers()
    assert before[0][0]
    with Console("debug"):
        assert handlers()[:3] == before[:3]
        assert [type(one) for one in request_log.log.handlers] == [LineHandler], "of which nothing was said"
    assert handlers() == before


def test_afterwards_all_is_as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    before = handlers()
    with Console("debug"):
        assert [type(one) for one in logging.getLogger().handlers] == [LineHandler]
        assert logging.getLogger("serve").level == logging.DEBUG
        assert logging.getLogger().level == logging.WARNING
    assert handlers() == before


# Lines.


@contextlib.contextmanager
def writing(end: int, **settings: int) -> Iterator[LineWriter]:
    lines = LineWriter(end, **settings)
    try:
        yield lines
    finally:
        lines.close(5)


def test_lines_come_in_order_and_whole():
    with pipe() as (reader, end), writing(end) as lines:
        for number in range(100):
            lines.put(f"{number} \ud800 é")
        assert lines.flush(5)
        assert os.read(reader, 4096).decode() == "".join(f"{number} \\ud800 é\n" for number in range(100))
        assert lines.num_dropped == 0


@pytest.mark.parametrize("blocking", [True, False])
def test_what_finds_no_place_is_dropped_counted_and_told(blocking: bool, caplog: pytest.LogCaptureFixture):
    with pipe() as (reader, end), writing(end, most_waiting=10_000) as lines:
        size = fill(end)
        os.set_blocking(end, blocking)
        for _ in range(100):
            lines.put("x" * 999)
        assert not lines.flush(0)
        assert lines.num_dropped == 90  # all that waits is counted, also what is being written
        read = b""
        while len(read) < size + 10_000:
            read += os.read(reader, 4096)
        assert read[size:].decode().splitlines() == ["x" * 999] * 10
        assert lines.flush(5)
        eventually(lambda: caplog.messages)
        assert caplog.messages == ["90 lines were dropped since the start: their reader had stopped"]
        lines.put("and on")
        assert lines.flush(5) and os.read(reader, 4096) == b"and on\n"


def test_a_reader_that_has_left_costs_lines_only(caplog: pytest.LogCaptureFixture):
    reader, end = os.pipe()
    os.close(reader)
    with writing(end) as lines:
        lines.put("for nobody")
        assert lines.flush(5)
    os.close(end)
    assert lines.num_dropped == 1 and not caplog.messages


def test_after_its_end_it_takes_nothing():
    with pipe() as (reader, end), writing(end) as lines:
        lines.put("before")
        lines.close(5)
        lines.put("after")
        assert os.read(reader, 4096) == b"before\n" and lines.num_dropped == 1
        eventually(lambda: f"jaxinfer-lines-{end}" not in {thread.name for thread in threading.enumerate()})


def test_a_line_that_cannot_be_made_is_replaced(capfd: pytest.CaptureFixture[str]):
    with pipe() as (reader, end), writing(end) as lines:
        LineHandler(lines).handle(logging.LogRecord("a.b", logging.INFO, "", 0, "%d", ("x",), None))
        assert lines.flush(5)
        assert os.read(reader, 4096).decode().startswith("a line of a.b could not be made of '%d': TypeError(")
    assert capfd.readouterr().err == ""
