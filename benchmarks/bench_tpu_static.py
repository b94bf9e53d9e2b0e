"""Kernels for TPUs by their machine code: bundles beside the attention that ships in jax and XLA's matmul.

Nothing runs on a TPU: programs are compiled on this machine, and the scalar half of their code is executed for the
lengths of the load (`pallas_kernels.aot`). A bundle takes at least one cycle; waiting is not counted. So every number
is predicted, and a bound. Without libtpu (`make aot-packages`) it says so, and every value is null.

    python -m benchmarks.bench_tpu_static [--quick]
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from benchmarks.report import Result, exit_code, report
from benchmarks.tpu_static import blocks, matmuls
from benchmarks.tpu_static.measure import Group, counts_of_groups
from benchmarks.tpu_static.shapes import AttentionShape, Count
from benchmarks.workloads import is_quick
from pallas_kernels.aot import toolchain
from pallas_kernels.aot.targets import target
from pallas_kernels.chips import Chip

TARGETS = ("v5e:1", "v6e:1")
SHOWN_TARGETS = ("v5p:1", "tpu7x:1")
"""Printed only: no floor is set for them."""
PAGE_SIZES = (16, 128)
LEAST_BYTES = 0.9
"""Of the ideal bytes: of queries and outputs some may lie in VMEM when a kernel starts."""


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
        """Ideal time over the longer of bundles and bytes: what neither waits nor arithmetic takes from the peak. Bytes
        are at least the ideal ones: those counted are of one core, and a v5p has two (`compare` sees to it that none
        is lost).
        """
        ideal = self.shape.ideal_bytes
        longest = max(self.ours.bundles * self.chip.hbm_bytes_per_cycle, self.ours.bytes_moved, ideal)
        return ideal / longest

    @property
    def share_of_matrix_peak(self) -> float:
        return self.shape.flops / self.chip.flops_per_cycle("bfloat16") / self.ours.bundles

    def line(self) -> str:
        shape, ours = self.shape, self.ours
        tokens = shape.rows * shape.context
        peer = "no block of jax's compiles"
        if self.peer and self.blocks:
            peer = f"jax {self.peer.bundles / tokens:6.2f} at {self.blocks[0]} x {self.blocks[1]}: {self.ratio:.2f}x"
        return (
            f"{shape.title:46} bundles a token {ours.bundles / tokens:6.2f}, {peer}; "
            f"loop of {ours.hot_bundles} spills in {ours.spilling:.1%}, around {ours.around}; "
            f"bandwidth {self.share_of_bandwidth:.2f}, matrix peak {self.share_of_matrix_peak:.2f}"
        )


def decode_shapes(kv_dtype: str, rows: Sequence[int], contexts: Sequence[int]) -> list[AttentionShape]:
    return [AttentionShape(n, 1, context, page, kv_dtype) for n in rows for context in contexts for page in PAGE_SIZES]


def prefill_shapes() -> list[AttentionShape]:
    """Whole prompts, and pieces of 512 behind a long context."""
    return [AttentionShape(rows, q_len, context, page) for rows, q_len, context in ((1, 8192, 8192), (4, 512, 4096))
            for page in PAGE_SIZES]  # fmt: skip


def contenders(target_name: str, shape: AttentionShape) -> list[dict[str, Any]]:
    """Ours, then jax's kernel with each of its blocks."""
    chip = target_name.partition(":")[0]
    prefill = blocks.PREFILL.get(chip, blocks.PREFILL[""])
    pairs, fields = prefill if shape.q_len > 1 else blocks.DECODE[shape.context], asdict(shape)
    return [{"kind": "ours", **fields}] + [
        {"kind": "jax", "pages": tokens // shape.page_size, "queries": queries, **fields} for tokens, queries in pairs
    ]


def attention_groups(target_name: str, quick: bool) -> list[tuple[AttentionShape, Group]]:
    """Prefill, which compiles longest, before decode. Targets without floors have the longest context only."""
    has_floors = target_name in TARGETS
    shapes = prefill_shapes() if not quick else []
    for kv_dtype in ("bfloat16", "int8"):
        rows = (32, 256) if has_floors and kv_dtype == "bfloat16" and not quick else (32,)
        contexts = (1024,) if quick else (1024, 8192) if has_floors else (8192,)
        shapes += decode_shapes(kv_dtype, rows, contexts)
    return [(shape, Group(target_name, shape.title, tuple(contenders(target_name, shape)))) for shape in shapes]


def compare(shape: AttentionShape, group: Group, found: Sequence[Count | str]) -> Comparison | None:
    """None, and a line about it, for a shape that ours refuses. Raises RuntimeError when ours does not compile."""
    ours, *peers = found
    if isinstance(ours, str) and ours.startswith("Unsupported"):
        tqdm.write(f"{group.target_name}: {shape.title}: {ours}")
        return None
    if isinstance(ours, str):
        raise RuntimeError(f"ours for {shape} does not compile: {ours}")
    chip = target(group.target_name).chip
    if shape.flops > ours.bundles * chip.flops_per_cycle("bfloat16") * chip.num_cores:
        raise RuntimeError(f"{group.target_name}: ours for {shape} cannot take {ours.bundles} bundles, less than its "
                           "products alone: a kernel was executed with operands that are not its own")  # fmt: skip
    if ours.bytes_moved * chip.num_cores < LEAST_BYTES * shape.ideal_bytes:
        raise RuntimeError(f"{group.target_name}: ours for {shape} moved {ours.bytes_moved} bytes, fewer than it must: "
                           "a copy was not counted")  # fmt: skip
    tried = [(count, (program["pages"] * shape.page_size, program["queries"]))
             for program, count in zip(group.programs[1:], peers, strict=True) if isinstance(count, Count)]  # fmt: skip
    peer, block = min(tried, key=lambda each: each[0].bundles, default=(None, None))
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
    """As `decode_results`; whole prompts and pieces behind a long context apart."""
    title = f"{name} prefill, predicted"
    whole = [each for each in found if each.shape.q_len == each.shape.context]
    pieces = [each for each in found if each.shape.q_len < each.shape.context]
    matrix = min((each.share_of_matrix_peak for each in found), default=math.nan)
    return [
        Result(f"{title} bundles over those of jax's kernel", worst_ratio(whole), "x", 0.8, 0.5),
        Result(f"{title} bundles over those of jax's kernel, pieces of 512", worst_ratio(pieces), "x", 0.8, 0.5),
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


def attention_results(target_name: str, found: list[Comparison], quick: bool = False) -> list[Result]:
    """Without marks for targets that have no floors; quick: nothing was prefilled."""
    decode = {dtype: [each for each in found if each.shape.q_len == 1 and each.shape.kv_dtype == dtype]
              for dtype in ("bfloat16", "int8")}  # fmt: skip
    prefill = [each for each in found if each.shape.q_len > 1]
    marked = [result for dtype, those in decode.items() for result in decode_results(target_name, dtype, those)]
    marked += prefill_results(target_name, prefill) if not quick else []
    if target_name in TARGETS:
        return marked
    return [Result(result.name, result.value, result.unit, better=result.better) for result in marked]


def measure(quick: bool) -> list[Result]:
    """Groups that compile longest first; lines as they are counted."""
    names = TARGETS if quick else (*TARGETS, *SHOWN_TARGETS)
    todo: list[tuple[AttentionShape | None, Group]] = [pair for name in names for pair in attention_groups(name, quick)]
    todo.sort(key=lambda pair: pair[0] is not None and pair[0].q_len == 1)
    todo += [(None, group) for name in TARGETS for group in matmuls.groups(name, quick)]
    compared: dict[str, list[Comparison]] = {name: [] for name in names}
    products: dict[str, list[matmuls.MatmulComparison]] = {name: [] for name in TARGETS}

    for index, found in counts_of_groups([group for _, group in todo]):
        shape, group = todo[index]
        if shape is None:
            new = matmuls.comparisons(group, found)
            products[group.target_name] += new
        else:
            new = [each for each in (compare(shape, group, found),) if each is not None]
            compared[group.target_name] += new
        tqdm.write("\n".join(f"{group.target_name:8} {each.line()}" for each in new))
    results = [result for name in TARGETS for result in matmuls.results(name, products[name])]
    return results + [result for name in names for result in attention_results(name, compared[name], quick)]


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
    results = measure(quick)
    report("tpu_static", results)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
