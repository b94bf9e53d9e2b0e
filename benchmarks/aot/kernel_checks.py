"""What must hold of each compiled call of a kernel, and the table by kernel and chip that shows it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """A call and what the compiler made of it. xla_spilling: of XLA's own dot at the same shape, where it was asked."""

    program: KernelProgram
    measured: Measured
    xla_spilling: float | None = None

    @property
    def title(self) -> str:
        options = (f"{name}={value}" for name, value in self.program.arguments.items() if name != "implementation")
        return f"{self.program.kernel} for {self.program.target} ({' '.join(options)})"

    @property
    def spilling(self) -> LoopFigures | None:
        """The kernel of a TPU whose hot loop spills most."""
        return max(ours(self.measured), key=lambda loop: loop.loop_spilling, default=None)

    @property
    def limit(self) -> float:
        """Most of the hot loop's bundles that may spill. A matmul of many rows keeps its sums in VMEM, where XLA's own
        dot keeps them too: stores that are called spills and cost slots that are free.
        """
        return max(MOST_SPILLING, self.xla_spilling or 0.0)

    @property
    def spills(self) -> bool:
        """More than most kernels may."""
        return self.spilling is not None and self.spilling.loop_spilling > MOST_SPILLING

    def beside(self, dot: Measured) -> "Found":
        """With XLA's dot to hold it against."""
        return replace(self, xla_spilling=dot_spilling(dot))

    @property
    def gpu_kernels(self) -> tuple[ptxas.Kernel, ...]:
        return tuple(kernel for kernel in self.measured.kernels if "mosaic" in kernel.name)


def ours(measured: Measured) -> list[LoopFigures]:
    return [loop for loop in measured.loops if loop.kernel.startswith(KERNELS)]


def dot_spilling(measured: Measured) -> float:
    """Of XLA's matmul: the loop that fills most of the matrix unit's slots."""
    loops = sorted(measured.loops, key=lambda loop: loop.loop_matrix_fill)
    return loops[-1].loop_spilling if loops else 0.0


def complaints(found: Found) -> list[str]:
    """Everything that is not as it must be, in words."""
    measured, memory = found.measured, found.measured.memory
    if memory is None:
        return [f"did not compile: {(measured.error or '').strip().splitlines()[0][:300]}"]
    wrong = []
    worst = found.spilling
    if worst is not None and worst.loop_spilling > found.limit:
        wrong.append(f"{worst.kernel} spills in {worst.loop_spilling:.1%} of its hot loop, over {found.limit:.1%}")
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
    """TPU: share of a hot loop's bundles, XLA's own where that is the limit. GPU: bytes of spill stores of a kernel."""
    shares = [(each.spilling.loop_spilling, each) for each in compiled if each.spilling is not None]
    if shares:
        share, worst = max(shares, key=lambda each: each[0])
        return f"{share:.1%}" + (f" (XLA's dot {worst.xla_spilling:.1%})" if worst.xla_spilling is not None else "")
    stores = [kernel.spill_stores for each in compiled for kernel in each.gpu_kernels]
    return f"{max(stores):,} B" if stores else "-"
