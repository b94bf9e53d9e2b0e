"""Counts of programs, each list in a process of its own that has libtpu."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.tpu_static.shapes import Count
from pallas_kernels.aot import toolchain

JOB = "benchmarks.tpu_static.programs:count_programs"
# Minutes for a list of programs, of which the largest take one each.
SECONDS = 3600


def counts(target_name: str, programs: list[dict[str, Any]], seconds: float = SECONDS) -> list[Count | str]:
    """A `Count`, or the compiler's complaint, for each program (`programs.KINDS`).

    Raises as `toolchain.run`.
    """
    arguments = {"target_name": target_name, "programs": programs}
    found = toolchain.run(JOB, arguments, "tpu", dump=True, seconds=seconds).value
    return [each["error"] if "error" in each else Count(**each) for each in found]


def counts_of_targets(programs: dict[str, list[dict[str, Any]]]) -> dict[str, list[Count | str]]:
    """By target, two targets at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(programs, pool.map(counts, programs, programs.values()), strict=True))
