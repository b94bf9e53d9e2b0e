"""Counts of programs, compiled in processes of their own that have libtpu."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks.tpu_static.shapes import Count
from pallas_kernels.aot import toolchain

JOB = "benchmarks.tpu_static.programs:count_programs"
# A group's largest programs take minutes on a busy machine.
SECONDS = 3600
# Compilers of attention use about one core and 1.5 GiB each.
PROCESSES = 2


@dataclass(frozen=True)
class Group:
    """Programs (`programs.KINDS`) that are compiled for a target one after the other, and what to call them."""

    target_name: str
    title: str
    programs: tuple[dict[str, Any], ...]


def counts(target_name: str, programs: Sequence[dict[str, Any]], seconds: float = SECONDS) -> list[Count | str]:
    """A `Count`, or the compiler's complaint, for each program.

    Raises as `toolchain.run`.
    """
    arguments = {"target_name": target_name, "programs": list(programs)}
    found = toolchain.run(JOB, arguments, "tpu", dump=True, seconds=seconds).value
    return [each["error"] if "error" in each else Count(**each) for each in found]


def counts_of_groups(groups: Sequence[Group]) -> Iterator[tuple[int, list[Count | str]]]:
    """(index of a group, its counts) as they come; PROCESSES groups at a time, begun in order."""
    with ThreadPoolExecutor(PROCESSES) as pool, tqdm(total=len(groups), unit="group", desc="compiling") as progress:
        running = {pool.submit(counts, group.target_name, group.programs): i for i, group in enumerate(groups)}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
                progress.update()
        finally:
            pool.shutdown(cancel_futures=True)
