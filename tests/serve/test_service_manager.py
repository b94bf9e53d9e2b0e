"""What a service manager hears over a real socket, and what happens without one."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serve import probe
from serve.service_manager import READY, tell


@pytest.fixture
def manager(tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.settimeout(20)
        yield found


def test_ready_and_stopping_are_told_in_time(manager: socket.socket, tmp_path: Path):
    manager.bind(str(tmp_path / "notify"))
    command = [sys.executable, str(Path(__file__).with_name("serve_counting.py")), "0.2", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split("starting on ")[1].split(";")[0]
            assert probe.ask(address, "", None, 5) == "NOT_SERVING"
            assert manager.recv(100) == b"READY=1"
            assert probe.ask(address, "", None, 5) == "SERVING"
            server.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert server.wait(10) == 0
        finally:
            server.kill()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(100)  # each was told once


def test_an_abstract_name(manager: socket.socket):
    name = f"jaxinfer-test-{os.getpid()}"
    manager.bind(f"\0{name}")
    tell(READY, {"NOTIFY_SOCKET": f"@{name}"})
    assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_without_a_manager_nothing_happens(environment: dict[str, str], caplog: pytest.LogCaptureFixture):
    tell(READY, environment)
    assert not caplog.records


def test_a_manager_that_is_gone_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tell(READY, {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    assert "does not take READY=1" in caplog.text
