"""Kernels for TPUs by their machine code: bundles beside the attention that ships in jax and XLA's matmul.

Nothing runs on a TPU: programs are compiled on this machine, and the scalar half of their code is executed for the
lengths of the load (`pallas_kernels.aot`). A bundle takes at least one cycle; waiting is not counted. So every number
is predicted, and a bound. Without libtpu (`make aot-packages`) it says so, and every value is null.

    python -m benchmarks.bench_tpu_static [--quick]
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.report import Result, exit_code, report
from benchmarks.tpu_static import blocks
from benchmarks.tpu_static.measure import counts_of_targets
from benchmarks.tpu_static.shapes import AttentionShape, Count, MatmulShape
from benchmarks.workloads import is_quick
from pallas_kernels.aot import toolchain
from pallas_kernels.aot.targets import Chip, target

TARGETS = ("v5e:1", "v6e:1")
SHOWN_TARGETS = ("v5p:1", "tpu7x:1")
"""Printed only: no floor is set for them."""
PAGE_SIZES = (16, 128)
MANY_ROWS = 512


@dataclass(frozen=True)
class Comparison:
    """One shape on one target. blocks: (tokens, queries) of jax's kernel at its best."""

    shape: AttentionShape
    chip: Chip
    ours: Count
    peer: Count | None
    blocks: tuple[int, int] | None

    @property
    def ratio(self) -> float | None:
        return self.ours.bundles / self.peer.bundles if self.peer else None

    @property
    def share_of_bandwidth(self) -> float:
        """Ideal time over the longer of bundles and bytes: what neither waits nor arithmetic takes from the peak."""
        ideal = self.shape.ideal_bytes / self.chip.hbm_bytes_per_cycle
        return ideal / max(self.ours.bundles, self.ours.bytes_moved / self.chip.hbm_bytes_per_cycle)

    @property
    def share_of_matrix_peak(self) -> float:
        return self.shape.flops / self.chip.flops_per_cycle("bfloat16") / self.ours.bundles

    def line(self) -> str:
        shape, ours = self.shape, self.ours
        tokens = shape.rows * shape.context
        peer = "no block of jax's compiles"
        if self.peer and self.blocks:
            peer = f"jax {self.peer.bundles / tokens:6.2f} at {self.blocks[0]} x {self.blocks[1]}: {self.ratio:.2f}x"
        name = f"{shape.rows} x {shape.q_len} at {shape.context}, pages of {shape.page_size} {shape.kv_dtype}"
        return (
            f"  {name:46} bundles a token {ours.bundles / tokens:6.2f}, {peer}; "
            f"loop of {ours.hot_bundles} spills in {ours.spilling:.1%}, around {ours.around}; "
            f"bandwidth {self.share_of_bandwidth:.2f}, matrix peak {self.share_of_matrix_peak:.2f}"
        )


def decode_shapes(kv_dtype: str, rows: Sequence[int], contexts: Sequence[int]) -> list[AttentionShape]:
    return [AttentionShape(n, 1, context, page, kv_dtype) for n in rows for context in contexts for page in PAGE_SIZES]


def prefill_shapes() -> list[AttentionShape]:
    """Whole prompts, and pieces of 512 behind a long context."""
    return [AttentionShape(rows, q_len, context, page) for rows, q_len, context in ((1, 8192, 8192), (4, 512, 4096))
            for page in PAGE_SIZES]  # fmt: skip


def contenders(shape: AttentionShape) -> list[dict[str, Any]]:
    """Ours, then jax's kernel with each of its blocks."""
    table = blocks.PREFILL if shape.q_len > 1 else (blocks.INT8 if shape.kv_dtype == "int8" else blocks.DECODE)
    pairs = table if isinstance(table, tuple) else table[shape.context]
    fields = asdict(shape)
    return [{"kind": "ours", **fields}] + [
        {"kind": "jax", "pages": tokens // shape.page_size, "queries": queries, **fields} for tokens, queries in pairs
    ]


def compare(shapes: dict[str, list[AttentionShape]]) -> dict[str, list[Comparison]]:
    """By target; a shape that ours refuses is printed and left out.

    Raises RuntimeError when ours does not compile.
    """
    programs = {name: [program for shape in those for program in contenders(shape)] for name, those in shapes.items()}
    found = counts_of_targets(programs)
    return {
        name: [best for shape in those if (best := _best(shape, name, programs[name], found[name])) is not None]
        for name, those in shapes.items()
    }


def _best(
    shape: AttentionShape, name: str, programs: list[dict[str, Any]], found: list[Count | str]
) -> Comparison | None:
    wanted = asdict(shape)
    mine = [(p, c) for p, c in zip(programs, found, strict=True) if {key: p[key] for key in wanted} == wanted]
    (_, ours), *peers = mine
    if isinstance(ours, str) and ours.startswith("Unsupported"):
        print(f"{name}: {shape}: {ours}")
        return None
    if isinstance(ours, str):
        raise RuntimeError(f"ours for {shape} does not compile: {ours}")
    chip = target(name).chip
    if shape.flops > ours.bundles * chip.flops_per_cycle("bfloat16") * chip.num_cores:
        raise RuntimeError(f"{name}: ours for {shape} cannot take {ours.bundles} bundles, less than its products "
                           "alone: a kernel was executed with operands that are not its own")  # fmt: skip
    compiled = [(c, (p["pages"] * shape.page_size, p["queries"])) for p, c in peers if isinstance(c, Count)]
    peer, block = min(compiled, key=lambda each: each[0].bundles, default=(None, None))
    return Comparison(shape, chip, ours, peer, block)


def decode_results(name: str, kv_dtype: str, found: list[Comparison]) -> list[Result]:
    """Each the worst of its shapes; NaN, which misses every floor, when none is served."""
    floor, goal = (1.0, 0.6) if kv_dtype == "int8" else (0.8, 0.5)
    title = f"{name} decode, {kv_dtype} pages, predicted"
    bandwidth = min((each.share_of_bandwidth for each in found), default=math.nan)
    return [
        Result(f"{title} bundles over those of jax's kernel", worst_ratio(found), "x", floor, goal),
        Result(f"{title} bundles a token, pages of 16 over 128", small_pages(found), "x", 1.4, 1.4),
        Result(f"{title} share of bandwidth", bandwidth, "", 0.85, 0.95, "higher"),
        Result(f"{title} bundles of the loop that spill", worst_spilling(found), "", 0.05, 0.0),
    ]


def prefill_results(name: str, found: list[Comparison]) -> list[Result]:
    """As `decode_results`."""
    title = f"{name} prefill, predicted"
    matrix = min((each.share_of_matrix_peak for each in found), default=math.nan)
    return [
        Result(f"{title} bundles over those of jax's kernel", worst_ratio(found), "x", 0.8, 0.5),
        Result(f"{title} share of matrix peak", matrix, "", 0.70, 0.80, "higher"),
        Result(f"{title} bundles of the loop that spill", worst_spilling(found), "", 0.05, 0.0),
    ]


def worst_ratio(found: list[Comparison]) -> float | None:
    """None where jax's kernel takes none of the shapes."""
    ratios = [each.ratio for each in found if each.ratio is not None]
    return max(ratios) if ratios else (None if found else math.nan)


def worst_spilling(found: list[Comparison]) -> float:
    return max((each.ours.spilling for each in found), default=math.nan)


def small_pages(found: list[Comparison]) -> float:
    """Bundles with pages of 16 over bundles with pages of 128, the worst of the loads."""
    by_load: dict[tuple[int, int, int], dict[int, int]] = {}
    for each in found:
        load = (each.shape.rows, each.shape.q_len, each.shape.context)
        by_load.setdefault(load, {})[each.shape.page_size] = each.ours.bundles
    return max((bundles[16] / bundles[128] for bundles in by_load.values()), default=math.nan)


def measure_attention(quick: bool) -> list[Result]:
    results: list[Result] = []
    rows, contexts = ((32,), (1024,)) if quick else ((32, 256), (1024, 8192))
    for kv_dtype in ("bfloat16", "int8"):
        shapes = {
            name: decode_shapes(kv_dtype, rows if kv_dtype == "bfloat16" else (32,), contexts) for name in TARGETS
        }
        shapes |= {name: decode_shapes(kv_dtype, (32,), contexts[-1:]) for name in SHOWN_TARGETS if not quick}
        results += show(compare(shapes), lambda name, found, dtype=kv_dtype: decode_results(name, dtype, found))
    prefill = {name: prefill_shapes() for name in (*TARGETS, *(() if quick else SHOWN_TARGETS))}
    return results + show(compare(prefill), prefill_results)


def show(found: dict[str, list[Comparison]], results: Callable[[str, list[Comparison]], list[Result]]) -> list[Result]:
    """Prints a line a shape; the results of targets that have floors, and without marks of the others."""
    kept: list[Result] = []
    for name, those in found.items():
        print(f"{name}\n" + "\n".join(each.line() for each in those), flush=True)
        marked = results(name, those)
        kept += marked if name in TARGETS else [
            Result(r.name, r.value, r.unit, better=r.better) for r in marked
        ]  # fmt: skip
    return kept


def measure_matmul() -> list[Result]:
    """The implementation that callers get, beside XLA's dot."""
    rows = (1, 8, 64, 512)
    programs = {name: [{"kind": "matmul", "implementation": implementation, **asdict(MatmulShape(n))}
                       for n in rows for implementation in (None, "xla")] for name in TARGETS}  # fmt: skip
    results: list[Result] = []
    for name, found in counts_of_targets(programs).items():
        chip = target(name).chip
        for n, ours, xla in zip(rows, found[::2], found[1::2], strict=True):
            if not isinstance(ours, Count) or not isinstance(xla, Count):
                raise RuntimeError(f"{n} rows do not compile: {ours} {xla}")
            results += matmul_results(f"{name} int8 matmul, {n} rows, predicted", MatmulShape(n), chip, ours, xla)
    return results


def matmul_results(title: str, shape: MatmulShape, chip: Chip, ours: Count, xla: Count) -> list[Result]:
    """From MANY_ROWS on the matrix slots, below the bandwidth. Bundles hold the quantisation, on both sides."""
    matrix = shape.flops / chip.flops_per_cycle("int8")
    memory = shape.ideal_bytes / chip.hbm_bytes_per_cycle
    beside = Result(f"{title} bundles over those of XLA's dot", ours.bundles / xla.bundles, "x")
    if shape.rows >= MANY_ROWS:
        return [
            Result(f"{title} matrix slots in use in the loop", ours.matrix_fill, "", 0.90, 0.98, "higher"),
            Result(f"{title} share of matrix peak", matrix / ours.bundles, "", better="higher"),
            Result(f"{title} matrix slots in use by XLA's", xla.matrix_fill, "", better="higher"),
            beside,
        ]
    share = memory / max(ours.bundles, ours.bytes_moved / chip.hbm_bytes_per_cycle)
    return [Result(f"{title} share of bandwidth", share, "", 0.75, 0.90, "higher"), beside]


def skipped() -> list[Result]:
    """The names of what would have been counted."""
    names = [f"{name} {what}, predicted" for name in TARGETS for what in ("decode", "prefill", "int8 matmul")]
    return [Result(name, None, "") for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a floor is missed."""
    quick = is_quick(__doc__, argv)
    reason = toolchain.missing("tpu")
    if reason is not None:
        print(f"skipped: {reason}")
        report("tpu_static", skipped())
        return 0
    results = measure_matmul() + measure_attention(quick)
    report("tpu_static", results)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
