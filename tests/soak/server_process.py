"""A server as a process, seen from outside: its lines, memory, metrics and end."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serve.client import Client

ROOT = Path(__file__).resolve().parents[2]
DEMO = ("-m", "jaxinfer.cli", "serve", "demo", "--port", "0", "--metrics-port", "0")
SMALLEST = ("--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--max-model-len", "256", "--num-pages", "64")
"""As few programs as there can be, for servers that compile again and again."""
SIZES = ("--dtype", "float32", "--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--max-model-len", "256",
         "--num-pages", "128", "--max-decode-rounds", "1")
"""Few programs, so that a start is short; one round a step, so that each token is a message of its own."""
ROWS, PAGES = 4, 128
STARTING = re.compile(r"starting on (\S+); loading the model; metrics at (\S+)")
SECONDS = 120.0
"""For a cold start on a busy machine."""


@dataclass
class ServerProcess:
    """log: what it wrote, to both of its outputs. began: monotonic seconds of its start."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float
    address: str = ""
    metrics_url: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def lines(self, word: str) -> list[str]:
        """Lines of the log that have `word`."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if word in line]

    def wait_bound(self) -> None:
        """Until it listens: `address` and `metrics_url` are known."""
        self._wait(lambda: self.lines("starting on "), "listen")
        found = STARTING.search(self.log.read_text(errors="replace"))
        assert found is not None
        self.address, self.metrics_url = found.groups()

    def wait_ready(self) -> float:
        """Seconds from its start until it was ready."""
        self._wait(lambda: self.lines("ready on "), "get ready")
        return time.monotonic() - self.began

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        while not condition():
            if self.process.poll() is not None or time.monotonic() - self.began > SECONDS:
                raise AssertionError(f"the server did not {what}:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.02)

    def memory(self) -> int:
        """Resident bytes, without pages of files (which the system may take back)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def metrics(self) -> dict[str, float]:
        """Series, as `name` or `name{label="value"}`, to their values."""
        with urllib.request.urlopen(self.metrics_url, timeout=30) as answer:  # noqa: S310 (its own address)
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def client(self) -> Client:
        return Client(self.address)


def in_environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "serve"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def start(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> ServerProcess:
    """Starts `python COMMAND`; its log lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"server-{len(list(folder.glob('server-*')))}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env=in_environment() if environment is None else dict(environment))
    return ServerProcess(process, log, time.monotonic())


def demo_command(*options: str) -> tuple[str, ...]:
    return (*DEMO, *SIZES, *options)


@contextmanager
def running(command: Sequence[str], folder: Path) -> Iterator[ServerProcess]:
    """A ready server, killed at the end if it still runs."""
    server = start(command, folder)
    try:
        server.wait_bound()
        server.wait_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()
