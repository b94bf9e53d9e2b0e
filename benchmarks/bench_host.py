"""What the host does in a step: plan, pack, read, commit, stop ids. The device answers at once with prepared results.

Engine, scheduler, packing and reading are the real ones; only transfers and compiled programs are missing. In the busy
load, whose figures have the limits, requests of 8 to 256 tokens in and out (log-uniform) wait at any time and one in
eight ends by a stop id: rows end, begin and grow pages all the time, and more than half of the steps hold prompts. A
figure is the median over blocks of the mean step of a block, so that every kind of step counts by its share. Nothing in
a step waits, so on a quiet machine CPU time equals it; the parts are in CPU time.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.instant import InstantEngine, Scenario
from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import is_quick
from jaxinfer.types import StepKind

LIMITS_US = {64: (600.0, 200.0), 256: (1500.0, 500.0)}
"""Rows to floor and goal, microseconds a step."""

BACKLOG, STOP_CHANCE = 32, 1 / 512
LONG = 2000
"""Output tokens of the rows that neither begin nor end while they are measured."""

FUSED_ROUNDS = 8

KINDS = {StepKind.PREFILL: "with prompts", StepKind.DECODE: "without prompts"}


@dataclass(frozen=True, slots=True)
class Size:
    """num_blocks blocks of num_steps steps; half of all are also measured in CPU time."""

    num_blocks: int
    num_steps: int


def block_means(engine: InstantEngine, size: Size) -> tuple[list[float], list[float]]:
    """Mean seconds a step of each block, by the wall and by the thread's CPU time in turns."""
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(size.num_blocks):
        wall.append(statistics.fmean(engine.step_seconds(size.num_steps)))
        cpu.append(statistics.fmean(engine.step_seconds(size.num_steps, time.thread_time)))
    return wall, cpu


def busy(num_rows: int, size: Size) -> list[Result]:
    """Rows come and go, and requests wait."""
    engine = InstantEngine(Scenario(num_rows, backlog=BACKLOG, stop_chance=STOP_CHANCE))
    engine.step_seconds(size.num_steps)
    wall, cpu = block_means(engine, size)
    parts, by_kind = engine.split(size.num_blocks * size.num_steps)
    name, (floor, goal) = f"{num_rows} rows", LIMITS_US[num_rows]
    return [
        Result(name, microseconds(wall), "us", floor, goal),
        Result(f"{name}: in CPU time", microseconds(cpu), "us"),
        *(Result(f"{name}: CPU time of {part}", seconds * 1e6, "us") for part, seconds in parts.items()),
        *(Result(f"{name}: steps {what}, in CPU time", microseconds(by_kind[kind]), "us")
          for kind, what in KINDS.items() if by_kind[kind]),
        Result(f"{name}: adding a request", microseconds(engine.add_seconds), "us"),
    ]


def steady(num_rows: int, size: Size) -> list[Result]:
    """No row comes or goes; pages grow. Fused steps bring several tokens a row."""
    found = []
    for rounds in (1, FUSED_ROUNDS):
        engine = InstantEngine(Scenario(num_rows, rounds=rounds, outputs=(LONG, LONG)))
        most = LONG // rounds // (2 * size.num_blocks) - 4
        wall, cpu = block_means(engine, Size(size.num_blocks, min(size.num_steps, most)))
        name = f"{num_rows} rows: decode only, {rounds} round{'s' if rounds > 1 else ''} a step"
        found += [Result(name, microseconds(wall), "us"), Result(f"{name}, in CPU time", microseconds(cpu), "us")]
    return found


def microseconds(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1e6


def main() -> int:
    size = Size(2, 20) if is_quick(__doc__) else Size(10, 150)
    found = [result for measure in (busy, steady) for num_rows in LIMITS_US for result in measure(num_rows, size)]
    report("host", found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
