"""Parts of a bench in processes of their own: a kernel that faults or hangs ends its part and no other."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.report import Result, shown

type Measure = Callable[[], Iterable[Result]]


def failure(name: str, why: str) -> Result:
    """A number that is under its floor, so that the bench fails and says what failed."""
    return Result(f"{name}: failed ({' '.join(why.split())[:160]})", 1, "", 0, 0)


def attempt(name: str, measure: Measure) -> list[Result]:
    """What `measure` gives, and a failure where it raises, with the traceback on stderr."""
    found: list[Result] = []
    try:
        for result in measure():
            found.append(result)  # what was there before it raised stays
    except Exception as error:  # whatever a compiler, a driver or a peer raises: the rest still runs
        traceback.print_exc()
        found.append(failure(name, f"{type(error).__name__}: {error}"))
    return found


def write(path: Path, results: Iterable[Result]) -> None:
    """Appends results to the file of a part, whole lines at once: what is there stays when the process dies."""
    with path.open("a") as file:
        for result in results:
            print(f"{result.name}: {shown(result.value)} {result.unit}".rstrip(), flush=True)
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
            file.flush()


def run(command: Sequence[str], name: str, seconds: float) -> list[Result]:
    """The results of `command` with `--out FILE`, which writes them there (`write`), and a failure where it ends with
    another status than 0 or does not end in time. What it prints goes where this process prints.
    """
    if seconds <= 0:
        return [failure(name, "no time was left for it")]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder, "results")
        why = ended(subprocess.Popen([*command, "--out", str(path)], stdout=sys.stderr), seconds)
        lines = path.read_text().splitlines() if path.exists() else []
    found = [Result(**json.loads(line)) for line in lines]
    return found + ([failure(name, why)] if why else [])


def ended(process: subprocess.Popen, seconds: float) -> str | None:
    """Waits; why the process did not end well, or None."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"did not end in {seconds:.0f} s"
    return f"exit status {status}" if status else None


def at_once(jobs: Sequence[Callable[[], list[Result]]]) -> list[Result]:
    """Results of all jobs, in their order; each waits for a process of its own."""
    with ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        return [result for found in pool.map(lambda job: job(), jobs) for result in found]
