"""The gateway `smg` as a process in front of our servers: it gives the OpenAI API, and spreads requests over them.

The servers speak `vllm.grpc.engine` to it. Its tokenizer comes from them too, so it needs no model folder.
"""

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
OPTIONS: Mapping[str, str] = {
    "policy": "cache_aware",  # prompts that begin alike go to the server that has their beginning in its cache
    "worker-startup-check-interval": "1",  # seconds; a server that still loads is asked again
    "health-check-interval-secs": "5",  # so that a server that comes back is used again soon
    "shutdown-grace-period-secs": "1",
    "log-level": "warn",
}
"""What differs from the gateway's defaults, without the dashes."""
WAIT_SECONDS, STOP_SECONDS, POLL_SECONDS = 60.0, 15.0, 0.1


class GatewayFailed(Exception):
    """The gateway is not installed, did not start, or does not see its servers."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that runs. url: of its HTTP server; `url`/v1 is the OpenAI API."""

    url: str
    process: subprocess.Popen[bytes]

    def workers(self) -> list[dict[str, Any]]:
        """The servers behind it, as it lists them. Raises OSError while it does not answer."""
        return self._get("workers")["workers"]

    def is_ready(self, num_workers: int) -> bool:
        """Whether it can answer with so many servers. A server is healthy to it a moment before it has the server's
        tokenizer, without which it answers 503. Raises OSError while it does not answer at all.
        """
        num_healthy = sum(worker["is_healthy"] for worker in self.workers())
        return num_healthy >= num_workers and bool(self._get("v1/tokenizers")["tokenizers"])

    def wait_for(self, num_workers: int, timeout: float = WAIT_SECONDS) -> None:
        """Until so many servers are ready behind it. Raises GatewayFailed."""
        until = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                if self.is_ready(num_workers):
                    return
            time.sleep(POLL_SECONDS)
        ended = self.process.returncode is not None
        raise GatewayFailed(f"the gateway ended with exit code {self.process.returncode}" if ended else
                            f"the gateway did not see {num_workers} servers within {timeout:g} s")

    def _get(self, path: str) -> Any:
        # Without proxies: it is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/{path}", timeout=5) as answer:
            return json.load(answer)


@contextlib.contextmanager
def gateway(addresses: Sequence[str], log: Path | None = None, options: Mapping[str, str] | None = None
            ) -> Iterator[Gateway]:  # fmt: skip
    """Starts a gateway on a free port of this machine, yields it once all servers are ready behind it, and stops it.

    addresses: "host:port" of each server. log: where its output goes; None drops it. options: over OPTIONS.
    Raises GatewayFailed.
    """
    if importlib.util.find_spec("smg") is None:
        raise GatewayFailed("the gateway is not installed; pip install smg (version 1.13 or newer)")
    port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "smg", *arguments(addresses, port, metrics_port, {**OPTIONS, **(options or {})})]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log is not None else subprocess.DEVNULL
        process = stack.enter_context(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))  # noqa: S603
        stack.callback(stop, process)
        found = Gateway(f"http://{LOOPBACK}:{port}", process)
        found.wait_for(len(addresses))
        yield found


def arguments(addresses: Sequence[str], port: int, metrics_port: int, options: Mapping[str, str]) -> list[str]:
    fixed = {"host": LOOPBACK, "port": str(port), "prometheus-host": LOOPBACK, "prometheus-port": str(metrics_port)}
    named = [part for name, value in {**fixed, **options}.items() for part in (f"--{name}", value)]
    return ["launch", *named, "--worker-urls", *(f"grpc://{address}" for address in addresses)]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def stop(process: subprocess.Popen[bytes]) -> None:
    """With SIGTERM, and for good if that does not help."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
