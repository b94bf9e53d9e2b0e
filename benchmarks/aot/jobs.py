"""The jobs of `make aot`: a model's step on a target, or some calls of kernels on a chip. Two run at once."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from benchmarks.aot import checks, kernel_checks, kernels
from benchmarks.aot.cases import Case
from benchmarks.aot.kernel_checks import Found
from benchmarks.aot.kernels import KernelProgram
from pallas_kernels.aot import measure, toolchain
from pallas_kernels.aot.measure import Measured
from pallas_kernels.aot.targets import target

STEP = "benchmarks.aot.steps:compile_case"
STEP_SECONDS = 3600
"""Ten times what an idle machine needs: others may use it too."""
FAILURES = (toolchain.JobFailed, subprocess.TimeoutExpired)
"""Of one job; the others go on."""
WORKERS = 2
A_PROCESS = 12
"""Calls of kernels: starting a process costs as much as compiling two or three."""


@dataclass(frozen=True)
class Job:
    """A process or two.

    Fields:
      name: as on the command line. units: parts of the progress.
      run: gives (case, result) or a list of `Found`; complaints: what is wrong with that, in words.
    """

    name: str
    units: int
    run: Callable[[], Any]
    complaints: Callable[[Any], list[str]]


def step_jobs(cases: Sequence[Case], every: bool) -> list[Job]:
    return [Job(case.name, 1, lambda case=case: (case, compile_step(case, every)), step_complaints) for case in cases]


def step_complaints(result: tuple[Case, dict[str, Any]]) -> list[str]:
    return [f"{result[0].name}: {complaint}" for complaint in checks.complaints(*result)]


def kernel_complaints(calls: Sequence[Found]) -> list[str]:
    return [f"{call.title}: {complaint}" for call in calls for complaint in kernel_checks.complaints(call)]


def compile_step(case: Case, every: bool) -> dict[str, Any]:
    """What the job of a case returns, or the failure that ended it."""
    try:
        platform = target(case.target).platform
        return toolchain.run(STEP, case.arguments() | {"every": every}, platform, seconds=STEP_SECONDS).value
    except FAILURES as failure:
        return {"failure": str(failure)}


def kernel_jobs(chip: str, wanted: Callable[[str], bool]) -> Iterator[Job]:
    """Of the groups whose names are wanted."""
    chosen = [each for each in kernels.programs(chip) if wanted(each.group)]
    for (name, _), group in itertools.groupby(chosen, key=lambda each: (each.group, each.operation)):
        for some in itertools.batched(group, A_PROCESS):
            yield Job(name, len(some), lambda some=some: compile_kernels(some), kernel_complaints)


def compile_kernels(programs: Sequence[KernelProgram]) -> list[Found]:
    """All of one operation, in one process."""
    target_name = programs[0].target
    try:
        arguments = [dict(each.arguments) for each in programs]
        measured = measure.measure(programs[0].operation, arguments, target_name)
    except FAILURES as failure:
        measured = [Measured(dict(each.arguments), error=str(failure)) for each in programs]
    return [Found(*each) for each in zip(programs, measured, strict=True)]


def run(jobs: Sequence[Job]) -> list[Any]:
    """Results in the order of the jobs; a line on stderr as each ends, and a bar where that is a terminal."""
    began = time.perf_counter()
    total = sum(job.units for job in jobs)
    print(f"compiling {total} steps and calls of kernels in {len(jobs)} jobs, {WORKERS} at once", file=sys.stderr)
    with (
        ThreadPoolExecutor(WORKERS) as pool,
        tqdm(total=total, desc="compiling", unit="part", disable=None, leave=False) as bar,
    ):
        futures = {pool.submit(timed, job): job for job in jobs}
        left: set[Future[Any]] = set(futures)
        while left:
            done, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)  # a defect: nothing more is begun
                job, (result, seconds) = futures[future], future.result()
                bar.update(job.units)
                so_far, wrong = time.perf_counter() - began, len(job.complaints(result))
                verdict = f"{wrong} complaints" if wrong else "good"
                tqdm.write(f"{so_far:5.0f} s  {job.name} ({job.units}): {seconds:.0f} s, {verdict}", file=sys.stderr)
            bar.refresh()
    return [future.result()[0] for future in futures]


def timed(job: Job) -> tuple[Any, float]:
    began = time.perf_counter()
    return job.run(), time.perf_counter() - began
