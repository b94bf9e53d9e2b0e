"""Soak loops: short ones with the suite, the full ones with --soak (`make soak`). The same code runs, counts differ.

Each test notes figures; they are printed as a table at the end, and written as JSON with --soak-json FILE.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from canary import Canary
from figures import Figures
from server_process import ServerProcess, demo_command, running


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="soak loops with their full counts")
    parser.addoption("--soak-json", metavar="FILE", help="write the figures of the soak loops there")


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether the counts are the full ones. Times are promises only then: the suite runs on any machine."""
    return bool(request.config.getoption("--soak", default=False))


@pytest.fixture(scope="session")
def count(is_full: bool) -> Callable[[int, int], int]:
    """count(short, full)."""
    return lambda short, full: full if is_full else short


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Figures:
    def note(**values: Any) -> None:
        for name, value in values.items():
            record_property(f"soak {name}", round(value, 3) if isinstance(value, float) else value)

    return note


@pytest.fixture(scope="session", autouse=True)
def surroundings(is_full: bool) -> Iterator[None]:
    """Full loops measure, so their servers compile as users' do: without the suite's flags."""
    if sys.platform != "linux":
        pytest.skip("processes are looked at through /proc")
    with pytest.MonkeyPatch.context() as patch:
        if is_full:
            patch.delenv("XLA_FLAGS", raising=False)
        yield


@pytest.fixture(scope="session")
def beside() -> Iterator[ProcessPoolExecutor]:
    """A process that makes load: in this one it would slow the canary's clock."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """The demo model served; DEMO_OPTIONS of the test's module are added. It must be the same process at the end, and
    have logged no error. Nothing here makes the engine hang, so it must not be taken for hung, with less patience than
    by default.
    """
    options = (*getattr(request.module, "DEMO_OPTIONS", ()), "--hang-seconds", "15")
    with running(demo_command(*options), tmp_path_factory.mktemp("demo")) as server:
        yield server
        ended = server.process.poll()
        assert ended in (None, 0), f"the server ended with {ended}"
        for word in ("Traceback", "has not got on"):
            assert not server.lines(word), server.log.read_text(errors="replace")[-6000:]


@pytest.fixture(scope="module")
def canary(demo: ServerProcess) -> Canary:
    return Canary(demo.address)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = {report.nodeid: figures_of(report) for reports in terminalreporter.stats.values() for report in reports
             if getattr(report, "when", None) == "call" and figures_of(report)}
    if not found:
        return
    machine = f"{os.cpu_count()} x {platform.machine()}, {time.strftime('%Y-%m-%d')}"
    terminalreporter.section(f"soak figures ({machine})")
    for name, values in found.items():
        terminalreporter.write_line(name)
        terminalreporter.write_line("    " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if path := config.getoption("--soak-json", default=None):
        Path(path).write_text(json.dumps({"machine": machine, "figures": found}, indent=1) + "\n")


def figures_of(report: Any) -> dict[str, Any]:
    return {name.removeprefix("soak "): value for name, value in getattr(report, "user_properties", ())
            if name.startswith("soak ")}


