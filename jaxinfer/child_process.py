"""A worker process that can be killed: jobs and replies are lines of JSON, one at a time.

For work on data that is not trusted and cannot be stopped from inside the process: templates, grammars.
"""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
"""For a child to import what it needs and set itself up; a fraction of a second on an idle machine."""


class ChildProcess:
    """One child. `serve`, a function as "module:name", gets the setup, the stream of jobs and the stream of replies.

    It runs until its input ends. The child ends with `kill()`, with the last reference to this object, or with
    this process.
    """

    def __init__(self, serve: str):
        # The child sees an import path and its setup, and only ever answers with a line of JSON.
        self._process = subprocess.Popen(  # noqa: S603 (fixed program, our own interpreter)
            [sys.executable, "-I", "-c", PROGRAM, serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        self._condemned = False
        self.kill = weakref.finalize(self, _end, self._process)
        """Ends the process; runs by itself when nobody holds the child any more, and at exit."""

    @property
    def alive(self) -> bool:
        return not self._condemned and self._process.poll() is None

    def set_up(self, setup: Mapping[str, Any]) -> dict[str, Any] | None:
        """Sends the first line, the import path with it; the reply, or None when the child died or hung."""
        path = [str(Path(__file__).parents[1]), *(str(Path(entry).absolute()) for entry in sys.path)]
        return self.ask({**setup, "path": path}, START_SECONDS)

    def ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply, or None when the child died or was killed for taking longer than `seconds`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            return None
        # Ending the child is what ends the blocking calls below, so nothing else needs a time limit.
        timer = threading.Timer(seconds, self.condemn)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(json.dumps(job).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = b""
        except BaseException:
            # Ctrl-C here must not leave a reply in the pipe: the next job would read it as its own.
            self.condemn()
            raise
        finally:
            timer.cancel()
            timer.join()
        return json.loads(line) if line.endswith(b"\n") else None

    def condemn(self) -> None:
        """Ends the process while another thread may be waiting for its reply, which is None then."""
        self._condemned = True  # poll() sees the end only a moment after kill()
        self._process.kill()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        try:
            if stream is not None:
                stream.close()
        except OSError:
            continue  # unwritten bytes of a dead child
    process.wait()


class NotReady(Exception):
    """A child could not set itself up. reply: what it said instead, None where it died or hung."""

    def __init__(self, reply: Mapping[str, Any] | None):
        self.reply = reply
        super().__init__(f"the child replied {reply}")


class Worker:
    """Children that do one job after the other; each is started when it is needed and the one before is gone.
    Thread-safe: jobs take turns.

    serve: of ChildProcess; its reply to the setup has the key "ready". setup: makes the setup of each child.
    """

    def __init__(self, serve: str, setup: Callable[[], Mapping[str, Any]]):
        self._serve = serve
        self._setup = setup
        self._lock = threading.Lock()
        self._child: ChildProcess | None = None
        self._starting: ChildProcess | None = None

    def start(self) -> None:
        """Starts the child that the first job would wait for. Raises NotReady."""
        with self._lock:
            self._running()

    def ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply, or None where the child died or took longer than `seconds`. Raises NotReady."""
        with self._lock:
            reply = self._running().ask(job, seconds)
            if reply is None:
                self._stop()
            return reply

    def close(self) -> None:
        """Ends the child: at once while it starts, else behind its job. A later job starts a new one."""
        starting = self._starting
        if starting is not None:
            starting.condemn()
        with self._lock:
            self._stop()

    def _running(self) -> ChildProcess:
        if self._child is not None and not self._child.alive:
            self._stop()
        if self._child is None:
            self._child = self._started()
        return self._child

    def _started(self) -> ChildProcess:
        child = self._starting = ChildProcess(self._serve)
        try:
            reply = child.set_up(self._setup())
        finally:
            self._starting = None
        if reply is None or "ready" not in reply:
            child.kill()
            raise NotReady(reply)
        return child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


# --- What runs in the child. ---

PROGRAM = """
import importlib, json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which may still be draining
setup = json.loads(sys.stdin.buffer.readline())
sys.path[:] = setup["path"]
module, name = sys.argv[1].split(":")
getattr(importlib.import_module(module), name)(setup, sys.stdin.buffer, sys.stdout.buffer)
"""


def send(replies: Any, reply: Mapping[str, Any]) -> None:
    """One line of JSON to the stream of replies."""
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


def limit_memory(num_bytes: int) -> None:
    """Bounds the address space of this process where the system can (not on macOS)."""
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    except (OSError, ValueError):
        return  # macOS knows no such limit: there time and output are bounded, memory only through them
