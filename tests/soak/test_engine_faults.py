"""Steps that fail, a step that hangs and an engine that ends, in a server of the demo model under load."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import server_process
from canary import Canary
from endings import told_unavailable
from figures import Figures
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_process import ServerProcess, demo_command
from tqdm import tqdm

from jaxinfer.engine import MAX_FAILURES

SCRIPT = str(Path(__file__).parent / "serve_faulty.py")
PROMPTS = ("def fibonacci(n):\n", "import os\n", "class Stack:\n")
"""Of the canaries: all but one of the rows."""
Status = health_pb2.HealthCheckResponse


@dataclass
class Faulty:
    """A server and the folder in which its faults are told."""

    server: ServerProcess
    folder: Path

    def fail(self, name: str) -> None:
        """An error at a fault point; returns when it has been raised."""
        file = self.folder / name
        file.touch()
        wait_until(lambda: not file.exists())

    @contextmanager
    def hang(self) -> Iterator[None]:
        """The running step does not end meanwhile."""
        file = self.folder / "hang"
        file.touch()
        try:
            wait_until((self.folder / "hangs").exists)
            yield
        finally:
            file.unlink()


class Health(threading.Thread):
    """Watches it: `changes` are times and statuses."""

    def __init__(self, address: str):
        super().__init__()
        self._address = address
        self.changes: list[tuple[float, Any]] = []
        self.start()
        wait_until(lambda: self.changes)

    def run(self) -> None:
        with grpc.insecure_channel(self._address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=300):
                    self.changes.append((time.monotonic(), answer.status))
            except grpc.RpcError:
                return  # the process is gone

    def wait(self, status: Any, since: float, seconds: float) -> float:
        """Seconds from `since` until it became `status`."""
        def found() -> list[float]:
            return [moment - since for moment, seen in self.changes if seen == status and moment >= since]

        wait_until(found, seconds)
        return found()[0]


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.001)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Faulty]]:
    """start(*options): a ready server."""
    with ExitStack() as stack:
        def begin(*options: str) -> Faulty:
            folder = tmp_path / f"faults-{len(list(tmp_path.glob('faults-*')))}"
            folder.mkdir()
            _, _, *arguments = demo_command(*options)
            running = server_process.running((SCRIPT, str(folder), *arguments), tmp_path)
            return Faulty(stack.enter_context(running), folder)

        yield begin


def end_of(faulty: Faulty, fault: str) -> dict[str, float]:
    """Milliseconds from a fault that the engine does not survive until streams were told, health said so, and the
    process ended; and its exit code.
    """
    health, moments = Health(faulty.server.address), []

    def harm() -> None:
        moments.append(time.monotonic())
        faulty.fail(fault)

    def wait() -> None:
        faulty.server.process.wait(30)
        moments.append(time.monotonic())

    with faulty.server.client() as client:
        lags = told_unavailable(client, harm, wait)
    failed, ended = moments
    not_serving = health.wait(Status.NOT_SERVING, failed, 1.0)
    health.join()
    return {"UNAVAILABLE": 1000 * max(lags), "NOT_SERVING": 1000 * not_serving, "end": 1000 * (ended - failed),
            "code": faulty.server.process.returncode}


def test_failing_steps(start: Callable[..., Faulty], count, is_full: bool, figures: Figures):
    """Failed steps under load cost time only: the rows are recomputed and go on, the same as ever, and nothing is
    compiled. The third within ten minutes ends the process.
    """
    rng, back, answers, ends = random.Random(8), [], 0, []
    for _ in tqdm(range(count(1, 10)), desc="servers", disable=not is_full):
        faulty = start()
        canaries = [Canary(faulty.server.address, prompt) for prompt in PROMPTS]
        with ExitStack() as stack:
            beside = [stack.enter_context(canary.beside()) for canary in canaries]
            for _ in range(MAX_FAILURES - 1):
                time.sleep(rng.uniform(0.1, 0.5))
                faulty.fail("read")
            answered = [paced.answers for paced in beside]
            wait_until(lambda seen=answered, beside=beside: all(
                paced.answers > before + 1 for paced, before in zip(beside, seen, strict=True)))
        back += [max(paced.gaps) for paced in beside]
        answers += sum(paced.answers for paced in beside)
        found = faulty.server.metrics()
        assert found["jaxinfer_failed_steps_total"] == MAX_FAILURES - 1
        assert found["jaxinfer_compiles_after_ready_total"] == 0
        ends.append(end_of(faulty, "read"))
    figures(failures=len(ends) * MAX_FAILURES, canary_answers=answers, longest_gap_ms=1000 * max(back),
            UNAVAILABLE_after_ms=largest(ends, "UNAVAILABLE"), NOT_SERVING_after_ms=largest(ends, "NOT_SERVING"),
            ended_after_ms=largest(ends, "end"), exit_codes=sorted({int(end["code"]) for end in ends}))
    assert max(back) < 10
    check_ends(ends, is_full)


def test_an_engine_that_ends(start: Callable[..., Faulty], count, is_full: bool, figures: Figures):
    """Its thread fails between two steps."""
    ends = [end_of(start(), "loop") for _ in tqdm(range(count(1, 10)), desc="servers", disable=not is_full)]
    figures(servers=len(ends), UNAVAILABLE_after_ms=largest(ends, "UNAVAILABLE"), exit_codes=sorted({
        int(end["code"]) for end in ends}), NOT_SERVING_after_ms=largest(ends, "NOT_SERVING"),
        ended_after_ms=largest(ends, "end"))
    check_ends(ends, is_full)


def test_a_step_that_hangs(start: Callable[..., Faulty], count, is_full: bool, figures: Figures):
    """With the patience that a server has by default, in full: it is told within a minute, and what runs goes on behind
    it.
    """
    faulty = start(*count(("--hang-seconds", "2"), ()))
    server, told, again = faulty.server, [], []
    canary = Canary(server.address, may_refuse=(grpc.StatusCode.UNAVAILABLE,))  # until health says SERVING again
    health = Health(server.address)
    with canary.beside() as paced:
        for number in range(1, count(1, 3) + 1):
            answered = paced.answers
            with faulty.hang():
                began = time.monotonic()
                told.append(health.wait(Status.NOT_SERVING, began, 60))
                with server.client() as client, pytest.raises(grpc.RpcError) as refused:
                    client.generate("a", max_tokens=1, timeout=10)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
                for words in ("engine has work and has not got on for", "self._hang()"):  # and the stack that hangs
                    wait_until(lambda words=words, number=number: len(server.lines(words)) == number)
                told[-1] = max(told[-1], time.monotonic() - began)
                released = time.monotonic()
            again.append(health.wait(Status.SERVING, released, 10))
            wait_until(lambda seen=answered: paced.answers > seen + 1)
    figures(hangs=len(told), NOT_SERVING_and_stacks_after_s=max(told), SERVING_again_after_s=max(again),
            canary_answers=paced.answers)
    assert max(told) <= 60


def check_ends(ends: list[dict[str, float]], is_full: bool) -> None:
    assert {end["code"] for end in ends} == {1}
    if is_full:
        assert largest(ends, "NOT_SERVING") <= 1000 and largest(ends, "end") <= 10_000


def largest(ends: list[dict[str, float]], name: str) -> float:
    return max(end[name] for end in ends)
