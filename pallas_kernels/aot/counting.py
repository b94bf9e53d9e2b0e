"""Executing all kernels of a compiled TPU program, and finding where most of their bundles are issued."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pallas_kernels.aot import tpu_schedule
from pallas_kernels.aot.tpu_execution import Execution, execute
from pallas_kernels.aot.tpu_schedule import Region, Schedule


@dataclass(frozen=True)
class Executed:
    """A kernel or fusion of a program, executed once. is_kernel: one of ours, its operands were given."""

    is_kernel: bool
    schedule: Schedule
    execution: Execution


def execute_calls(
    folder: Path | str, chip: str, calls: Iterable[tuple[str, dict[int, np.ndarray]]], *, with_fusions: bool = True
) -> list[Executed]:
    """Executes what libtpu dumped into a folder.

    Args:
      chip: as in `targets` ("v6e").
      calls: name and integer operands of each call of a kernel, in order (`kernel_operands`).
      with_fusions: also the fusions that XLA puts around the kernels.

    Raises ValueError for a call whose kernel was not dumped, and as `tpu_execution.execute`.
    """
    left = list(calls)
    executed: list[Executed] = []
    for schedule in tpu_schedule.collect(folder, chip):
        # "write_new_kv.1.args_6_" is the first call of write_new_kv, whose result is the seventh operand of another.
        name = re.sub(r"\.\d+(\..*)?$", "", schedule.kernel)
        index = next((i for i, (call, _) in enumerate(left) if call == name), None)
        if index is None and not with_fusions:
            continue
        known = left.pop(index)[1] if index is not None else {}
        executed.append(Executed(index is not None, schedule, execute(schedule, known)))
    if left:
        raise ValueError(f"kernels {[call for call, _ in left]} are not among {[e.schedule.kernel for e in executed]}")
    return executed


def issued(region: Region, execution: Execution) -> int:
    """Bundles of a region that were issued, inner loops not counted."""
    inner = {index for loop in region.loops for index in range(loop.first, loop.last + 1)}
    return sum(execution.counts[index] for index in range(region.first, region.last + 1) if index not in inner)


def hot_loop(schedule: Schedule, execution: Execution) -> Region:
    """The loop in which most bundles are issued; the kernel without loops."""
    loops = [region for region in schedule.root.walk() if region.kind == "loop"]
    return max(loops or [schedule.root], key=lambda region: issued(region, execution))
