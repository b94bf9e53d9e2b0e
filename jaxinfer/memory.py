"""How many pages fit: the memory plan, made before the programs are compiled for good."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxinfer.errors import InvalidConfig, OutOfMemory

CPU_SHARE = 0.25
"""Share of the available host memory that pages may take when the device is the CPU: other programs live there too."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device. `budget` is what the engine may use in all; temporaries are None where not measured."""

    budget: int
    weights: int
    temporaries: int | None
    bytes_per_page: int
    num_pages: int
    page_size: int
    rows: int = 0

    @property
    def pages(self) -> int:
        return self.num_pages * self.bytes_per_page

    def table(self) -> str:
        """For a person, before the start."""
        temporaries = [] if self.temporaries is None else [("temporaries", self.temporaries)]
        state = [("state of rows", self.rows)] if self.rows else []
        rows = [("budget", self.budget), ("weights", self.weights), *temporaries, *state,
                (f"{self.num_pages} pages of {self.page_size} tokens", self.pages),
                ("left", self.budget - self.weights - (self.temporaries or 0) - self.rows - self.pages)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {in_mib(size):>16}" for name, size in rows)


def plan_pages(*, budget: int, weights: int, temporaries: int | None, bytes_per_page: int, page_size: int,
               needed: int, most: int | None, wanted: int | None, on_cpu: bool, rows: int = 0) -> MemoryPlan:
    """Chooses the number of pages.

    needed: pages without which the engine cannot start (one a row, and one row of the full length).
    most: pages beyond which more are of no use, or None. wanted: what the user asked for, or None.
    temporaries: None where they are not measured. on_cpu: the budget follows from the host's memory. rows: bytes of
    the rows' state, and of the drafter's that does not depend on the pages.

    Raises InvalidConfig when `wanted` is too few to start at all, and OutOfMemory saying what is missing and which
    settings to change.
    """
    if wanted is not None and wanted < needed:
        raise InvalidConfig("num_pages", f"{wanted} pages of {page_size} tokens are under the {needed} needed (one a "
                            "row, and one row of max_model_len); raise it, or lower max_model_len or max_num_seqs")
    room = (budget - weights - (temporaries or 0) - rows) // bytes_per_page
    num_pages = wanted if wanted is not None else room if most is None else min(room, most)
    if num_pages > room or num_pages < needed:
        short = max(num_pages, needed)
        taken = "" if temporaries is None else f" and temporaries {in_mib(temporaries)}"
        taken += f" and the state of rows {in_mib(rows)}" if rows else ""
        more = "free memory of this machine" if on_cpu else "raise gpu_memory_utilization"
        raise OutOfMemory(
            f"{short} pages of {page_size} tokens need {in_mib(short * bytes_per_page)}, but of a budget of "
            f"{in_mib(budget)} weights take {in_mib(weights)}{taken}: room for "
            f"{max(room, 0)} pages. At least {needed} are needed (one a row, and one row of max_model_len). Lower "
            f"max_model_len, max_num_seqs or num_pages, or {more}")
    return MemoryPlan(budget, weights, temporaries, bytes_per_page, num_pages, page_size, rows)


def in_mib(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**20:,.1f} MiB"


def memory_budget(device: Any, utilization: float, weights: int) -> int:
    """Bytes the engine may use on `device` (a jax.Device), the weights that are already there included."""
    if device.platform == "cpu":
        return weights + int(CPU_SHARE * available_host_memory())
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    if not limit:
        raise OutOfMemory(f"{device} does not tell its memory; set num_pages")
    others = max(stats.get("bytes_in_use", 0) - weights, 0)
    return int(limit * utilization) - others


def available_host_memory() -> int:
    """Bytes free for us: what the kernel calls available, or less in a container with a limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return available if limit == "max" else min(available, int(limit))


def weight_bytes(params: object) -> int:
    """Bytes of a parameter tree, of arrays or of shapes with shardings, on the device that holds the most of it."""
    totals: dict[Any, int] = {}
    leaves: list[Any] = jax.tree.leaves(params)
    for leaf in leaves:
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for device in leaf.sharding.device_set:
            totals[device] = totals.get(device, 0) + shard
    return max(totals.values(), default=0)


def measure_temporaries(compile_largest: Callable[[], list[tuple[jax.stages.Compiled, int]]]) -> int:
    """Bytes of temporaries and outputs of the largest programs, from the compiler's own analysis; and with each, bytes
    that another program has handed it, which lie beside them.
    """
    most = 0
    for compiled, handed in compile_largest():
        analysis = compiled.memory_analysis()
        if analysis is not None:
            own = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
            most = max(most, own + handed)
    return most
