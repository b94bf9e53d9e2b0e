"""How long a user waits: `jaxinfer --help`, the import, and the first token of LLM("demo") in a fresh process.

Cold starts find an empty folder of compiled programs, warm ones the folder that the cold start before them filled; they
take turns. Every start is a process of its own, timed from its birth by the process that starts it. Both find the files
they read in the operating system's cache.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import interleaved, is_quick, median_ratio

IMPORT = "import time; import jaxinfer; from jaxinfer import LLM; print(time.monotonic())"

START = """
import json, sys, time
from jaxinfer import LLM, SamplingParams
imported = time.monotonic()
options = json.loads(sys.argv[1])
with LLM(quiet=True, **options) as llm:
    ready = time.monotonic()
    next(iter(llm.stream("def main(", SamplingParams(max_tokens=1, ignore_eos=True))))
    print(json.dumps({"import": imported, "ready": ready, "first token": time.monotonic(),
                      "load": llm.report.load_seconds, "compile": llm.report.compile_seconds}))
"""
"""Prints time.monotonic() at its stages, which is one clock for all processes of a machine."""

STAGES = ("import", "load", "compile", "ready", "first token")


@dataclass(frozen=True, slots=True)
class Size:
    """rounds: cold and warm starts. short_rounds: of the other commands. options: of LLM."""

    rounds: int
    short_rounds: int
    options: dict[str, str | int]


FULL = Size(3, 10, {"model": "demo"})
QUICK = Size(1, 1, {"model": "demo-draft", "max_model_len": 256, "max_num_seqs": 2, "max_num_batched_tokens": 8})


def help_seconds() -> float:
    """Of `jaxinfer --help`, to its end."""
    script = Path(sys.executable).with_name("jaxinfer")
    command = [script] if script.exists() else [sys.executable, "-m", "jaxinfer.cli"]
    began = time.monotonic()
    subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def import_seconds() -> float:
    """From the birth of a process until LLM is imported."""
    began = time.monotonic()
    return float(output(IMPORT)) - began


def output(script: str, *arguments: str, **environment: str) -> str:
    """What a Python process prints."""
    return subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.PIPE, text=True,
                          env=os.environ | environment).stdout


@dataclass(slots=True)
class Starts:
    """Starts of LLM with one folder of compiled programs after the other. seconds: by kind of start and stage."""

    options: dict[str, str | int]
    root: Path
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _folder: Path = Path()

    def cold(self) -> float:
        self._folder = Path(tempfile.mkdtemp(dir=self.root))
        return self.start("cold")

    def warm(self) -> float:
        """Follows `cold`."""
        return self.start("warm")

    def start(self, kind: str) -> float:
        """Seconds to the first token."""
        began = time.monotonic()
        found = json.loads(output(START, json.dumps(self.options), JAXINFER_COMPILE_CACHE=str(self._folder)))
        stages = self.seconds.setdefault(kind, {stage: [] for stage in STAGES})
        for stage in STAGES:
            stages[stage].append(found[stage] if stage in ("load", "compile") else found[stage] - began)
        return found["first token"] - began


def measure(size: Size) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """Seconds of the commands and to the first token, each round's, and the starts' stages."""
    with tempfile.TemporaryDirectory(prefix="bench_start_") as root:
        starts = Starts(size.options, Path(root))
        short: dict[str, Callable[[], float]] = {"jaxinfer --help": help_seconds, "import": import_seconds}
        found = interleaved(size.short_rounds, short)
        return found | interleaved(size.rounds, {"cold": starts.cold, "warm": starts.warm}), starts.seconds


def results(found: dict[str, list[float]], stages: dict[str, dict[str, list[float]]]) -> list[Result]:
    def seconds(name: str, values: list[float], limit: float | None = None) -> Result:
        return Result(name, statistics.median(values), "s", limit, limit)

    return [
        seconds("jaxinfer --help", found["jaxinfer --help"], 0.3),
        seconds("import of LLM", found["import"]),
        Result("warm over cold, to the first token", median_ratio(found["warm"], found["cold"]), "", 1 / 3, 0.2),
        *(seconds(f"{kind} start: {wording(stage)}", values)
          for kind, by_stage in stages.items() for stage, values in by_stage.items()),
    ]


def wording(stage: str) -> str:
    return f"of which {stage}" if stage in ("load", "compile") else f"to the {stage}" if stage == "first token" else (
        "until ready" if stage == "ready" else "until imported")


def main() -> int:
    found = results(*measure(QUICK if is_quick(__doc__) else FULL))
    report("start", found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
