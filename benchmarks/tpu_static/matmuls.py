"""int8 matmuls of a layer, beside XLA's."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.report import Result
from benchmarks.tpu_static.measure import Group
from benchmarks.tpu_static.shapes import Count, MatmulShape
from pallas_kernels.aot.targets import target
from pallas_kernels.chips import Chip

FEW_ROWS, MANY_ROWS = (8, 64), 512
# (D, F): matmuls of that size in a layer of 8B. Those that it does not have are of merged weights (q, k and v; gate and
# up): shown only.
LAYER = {(4096, 4096): 2, (4096, 1024): 2, (4096, 14336): 2, (14336, 4096): 1, (4096, 6144): 0, (4096, 28672): 0}
IMPLEMENTATIONS = ("tpu", "xla")


@dataclass(frozen=True)
class MatmulComparison:
    """One shape on one target; times: in a layer."""

    shape: MatmulShape
    chip: Chip
    ours: Count
    xla: Count
    times: int

    @property
    def ideal_cycles(self) -> float:
        """Of the bytes that have to come."""
        return self.shape.ideal_bytes / self.chip.hbm_bytes_per_cycle

    @property
    def cycles(self) -> float:
        """Predicted: the longer of bundles and bytes. XLA may have brought the rows into VMEM before, so that a kernel
        moves fewer bytes than there are: those count all the same.
        """
        return max(self.ours.bundles, self.ours.bytes_moved / self.chip.hbm_bytes_per_cycle, self.ideal_cycles)

    def line(self) -> str:
        shape, ours, xla = self.shape, self.ours, self.xla
        return (
            f"{shape.rows:3} rows of {shape.in_features:5} to {shape.out_features:5}: bundles {ours.bundles:7,} "
            f"(XLA {xla.bundles:7,}), matrix slots {ours.whole_fill:.3f} (XLA {xla.whole_fill:.3f}), in a step "
            f"{ours.step_fill:.3f} (XLA {xla.step_fill:.3f}), bandwidth {self.ideal_cycles / self.cycles:.3f}"
        )


type Side = Callable[[MatmulComparison], Count]
SIDES: tuple[Side, Side] = (lambda each: each.ours, lambda each: each.xla)


def groups(target_name: str, quick: bool) -> list[Group]:
    """One a weight."""
    weights, rows = (list(LAYER)[:1], (MANY_ROWS,)) if quick else (list(LAYER), (*FEW_ROWS, MANY_ROWS))
    return [
        Group(target_name, f"int8 matmul {d} x {f}", tuple(each for n in rows for each in pair(MatmulShape(n, d, f))))
        for d, f in weights
    ]


def pair(shape: MatmulShape) -> list[dict[str, Any]]:
    return [{"kind": "matmul", "implementation": name, **asdict(shape)} for name in IMPLEMENTATIONS]


def comparisons(group: Group, found: Sequence[Count | str]) -> list[MatmulComparison]:
    """Raises RuntimeError when one does not compile."""
    return [
        _comparison(group.target_name, program, ours, xla)
        for program, ours, xla in zip(group.programs[::2], found[::2], found[1::2], strict=True)
    ]


def _comparison(target_name: str, program: dict[str, Any], ours: Count | str, xla: Count | str) -> MatmulComparison:
    shape = MatmulShape(program["rows"], program["in_features"], program["out_features"])
    if not isinstance(ours, Count) or not isinstance(xla, Count):
        raise RuntimeError(f"{target_name}: {shape} does not compile: {ours} {xla}")
    times = LAYER[shape.in_features, shape.out_features]
    return MatmulComparison(shape, target(target_name).chip, ours, xla, times)


def results(target_name: str, found: Sequence[MatmulComparison]) -> list[Result]:
    """For each number of rows, of the matmuls of a layer together. At MANY_ROWS the matrix slots are held to a floor,
    below it the share of bandwidth. Bundles hold the quantisation, on both sides.
    """
    marked: list[Result] = []
    for rows in sorted({each.shape.rows for each in found}):
        layer = [each for each in found if each.shape.rows == rows and each.times]
        title = f"{target_name} int8 matmul, {rows} rows, predicted"
        marked += slots(title, layer) if rows >= MANY_ROWS else [bandwidth(title, layer)]
        ratio = total(layer, lambda each: each.ours.bundles) / total(layer, lambda each: each.xla.bundles)
        marked.append(Result(f"{title} bundles over those of XLA's", ratio, "x"))
    return marked


def bandwidth(title: str, layer: Sequence[MatmulComparison]) -> Result:
    share = total(layer, lambda each: each.ideal_cycles) / total(layer, lambda each: each.cycles)
    return Result(f"{title} share of bandwidth", share, "", 0.75, 0.90, "higher")


def slots(title: str, layer: Sequence[MatmulComparison]) -> list[Result]:
    """In a step, which is one block of features; and all in all, with the quantisation of the rows."""

    def share(side: Side, fill: Callable[[Count], float]) -> float:
        used = total(layer, lambda each: fill(side(each)) * side(each).bundles)
        return used / total(layer, lambda each: side(each).bundles)

    step, whole = ([share(side, fill) for side in SIDES] for fill in (lambda c: c.step_fill, lambda c: c.whole_fill))
    title = f"{title} matrix slots in use"
    return [
        Result(f"{title} in a step", step[0], "", 0.90, 0.98, "higher"),
        Result(f"{title} in a step, XLA's", step[1], "", better="higher"),
        Result(f"{title} all in all", whole[0], "", better="higher"),
        Result(f"{title} all in all, XLA's", whole[1], "", better="higher"),
    ]


def total(layer: Sequence[MatmulComparison], value: Callable[[MatmulComparison], float]) -> float:
    return sum(each.times * value(each) for each in layer)
