"""What must hold of each compiled call of a kernel, and the table by kernel and chip that shows it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import jax.numpy as jnp

from benchmarks.aot.kernels import KernelProgram
from pallas_kernels.aot import ptxas
from pallas_kernels.aot.measure import LoopFigures, Measured
from pallas_kernels.aot.memory import Copy, dimensions
from pallas_kernels.aot.programs import OPERATIONS
from pallas_kernels.tune.choosing import MOST_SPILLING

KERNELS = ("ragged_paged_attention", "attend_many", "write_new_kv", "int8_matmul", "int8_weight_matmul")
"""Of TPUs, by the beginnings of their names; every other loop is XLA's."""
COLUMNS = ("kernel", "target", "compiled", "worst spilling", "registers", "copies", "pages in place", "failed checks")
SMALL = 2 << 20
"""Bytes of temporaries that need no reason: work lists, scales."""


@dataclass(frozen=True)
class Found:
    """A call and what the compiler made of it."""

    program: KernelProgram
    measured: Measured

    @property
    def title(self) -> str:
        options = (f"{name}={value}" for name, value in self.program.arguments.items() if name != "implementation")
        return f"{self.program.kernel} for {self.program.target} ({' '.join(options)})"

    @property
    def spilling(self) -> LoopFigures | None:
        """The kernel of a TPU whose hot loop spills most."""
        return max(ours(self.measured), key=lambda loop: loop.loop_spilling, default=None)

    @property
    def gpu_kernels(self) -> tuple[ptxas.Kernel, ...]:
        return tuple(kernel for kernel in self.measured.kernels if "mosaic" in kernel.name)


def ours(measured: Measured) -> list[LoopFigures]:
    return [loop for loop in measured.loops if loop.kernel.startswith(KERNELS)]


def complaints(found: Found) -> list[str]:
    """Everything that is not as it must be, in words."""
    measured, memory = found.measured, found.measured.memory
    if memory is None:
        return [f"did not compile: {(measured.error or '').strip().splitlines()[0][:300]}"]
    wrong = []
    worst = found.spilling
    if worst is not None and worst.loop_spilling > MOST_SPILLING:
        wrong.append(f"{worst.kernel} spills in {worst.loop_spilling:.1%} of its hot loop, over {MOST_SPILLING:.1%}")
    spilling = (kernel for kernel in found.gpu_kernels if kernel.spill_stores + kernel.spill_loads + kernel.stack_frame)
    wrong += [f"ptxas spills {kernel.spill_stores} B, frame {kernel.stack_frame} B in {kernel.name}"
              for kernel in spilling]  # fmt: skip
    if not worst and not found.gpu_kernels:
        wrong.append("no kernel in the compiled program")
    sizes = Sizes.of(found.program)
    if memory.aliased < sizes.donated:
        wrong.append(f"{memory.aliased:,} B lie in donated arguments, the pages have {sizes.donated:,} B")
    wrong += [f"copies {copy.num_bytes:,} B: {copy.name} {copy.shape}" for copy in guarded_copies(found)]
    if memory.temporaries > sizes.allowed:
        wrong.append(f"temporaries of {memory.temporaries:,} B, over {sizes.allowed:,} B")
    return wrong


def guarded_copies(found: Found) -> list[Copy]:
    """Of what nothing may copy, by its size. Queries and outputs in float32, where pages have one byte, may be as large
    as a layer's pages: they are known by their dimensions.
    """
    made = OPERATIONS[found.program.operation](**found.program.arguments)
    own = sorted(made.arguments[0].shape) if made.donated else None
    least = Sizes.of(found.program).guarded
    return [copy for copy in found.measured.copies if copy.num_bytes >= least and sorted(dimensions(copy.shape)) != own]


@dataclass(frozen=True)
class Sizes:
    """Bytes: donated (the pages); guarded, of one layer's pages or the weight, which nothing may copy; allowed, of
    temporaries: less than those, or what queries and outputs take in the kernels' layouts and in float32, or x as it is
    quantised and filled up (on GPUs the partial results of a decode step have room for the most parts of every row).
    """

    donated: int
    guarded: int
    allowed: int

    @classmethod
    def of(cls, program: KernelProgram) -> Self:
        made = OPERATIONS[program.operation](**program.arguments)
        sizes = [math.prod(each.shape) * jnp.dtype(each.dtype).itemsize for each in made.arguments]
        if not made.donated:
            return cls(0, max(sizes), SMALL + 2 * sizes[0])
        (pages,) = made.donated
        layer = sizes[pages] // made.arguments[pages].shape[0]
        return cls(sizes[pages], layer, max(layer - 1, SMALL + 8 * sizes[0]))


def table(found: Sequence[Found]) -> str:
    """Markdown, a line a kernel and target."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for each in found:
        groups.setdefault((each.program.kernel, each.program.target), []).append(each)
    rows = [COLUMNS, tuple("-" * len(name) for name in COLUMNS)]
    rows += [row(kernel, where, group) for (kernel, where), group in groups.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(kernel: str, where: str, group: Sequence[Found]) -> tuple[str, ...]:
    compiled = [each for each in group if each.measured.memory is not None]
    copies = sum(len(guarded_copies(each)) for each in compiled)
    in_place = [each for each in compiled if Sizes.of(each.program).donated]
    aliased = [each for each in in_place if each.measured.memory.aliased >= Sizes.of(each.program).donated]  # type: ignore[union-attr]
    return (
        kernel,
        where,
        f"{len(compiled)} of {len(group)}",
        worst_spilling(compiled),
        str(max((kernel.registers for each in compiled for kernel in each.gpu_kernels), default="-")),
        str(copies),
        f"{len(aliased)} of {len(in_place)}" if in_place else "-",
        str(sum(bool(complaints(each)) for each in group)),
    )


def worst_spilling(compiled: Sequence[Found]) -> str:
    """TPU: share of a hot loop's bundles. GPU: bytes of spill stores of a kernel."""
    shares = [each.spilling.loop_spilling for each in compiled if each.spilling is not None]
    if shares:
        return f"{max(shares):.1%}"
    stores = [kernel.spill_stores for each in compiled for kernel in each.gpu_kernels]
    return f"{max(stores):,} B" if stores else "-"
