"""What is measured on the card, with floors and goals: the one place, for the run and for the table without a card."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.h200.attention import Load, decode, ragged_lens
from benchmarks.report import Result

PAGE_SIZES = (16, 64)
SMALL_ROWS = (1, 8, 16, 64)
FORMS = {"W8A8": True, "weight-only": False}
"""Of the int8 matmul: whether activations are quantised."""
STEP_ROWS = (1, 32)


@dataclass(frozen=True)
class Mark:
    """A number with its worst acceptable value and its goal, where more is better."""

    name: str
    floor: float
    goal: float
    unit: str = ""

    def result(self, value: float | None, against: str = "") -> Result:
        """against: the peer that a ratio was taken to."""
        name = self.name.replace("the best peer", against) if against else self.name
        return Result(name, value, self.unit, self.floor, self.goal, "higher")


def decode_loads() -> dict[str, tuple[Load, ...]]:
    """By name, one load a page size. A pass goes through so many layers that their pages are many times the L2."""
    rows = {"decode 32 x 4096": (4096,) * 32, "decode 32 x 4096 ragged": ragged_lens(32, 4096)}
    loads = {name: decode(name, lens, 64, num_layers=8) for name, lens in rows.items()}
    loads["decode 1 x 1024"] = decode("decode 1 x 1024", (1024,), 64, num_layers=64)
    return {name: tuple(replace(load, page_size=size) for size in PAGE_SIZES) for name, load in loads.items()}


PREFILL = Load("prefill 8192 causal", (8192,), (8192,), 64, num_layers=4)


def share_of_decode(load: Load) -> Mark:
    return Mark(f"{load.name}, pages of {load.page_size}: share of read bandwidth", 0.80, 0.90)


def speedup_of_decode(load: Load) -> Mark:
    goal = 1.5 if len(load.kv_lens) == 1 else 1.15
    return Mark(f"{load.name}, pages of {load.page_size}: against the best peer", 1.0, goal, "x")


SPEEDUP_OF_PREFILL = Mark(f"{PREFILL.name}, pages of 64: against the best peer", 0.90, 1.03, "x")
SPEEDUP_OF_INT8 = Mark("int8 matmul 4096 rows, quantisation included: against the best peer", 1.0, 1.25, "x")


def share_of_int8(rows: int, form: str) -> Mark:
    return Mark(f"int8 matmul {rows} rows, {form}: share of read bandwidth", 0.70, 0.88)


def share_of_step(rows: int) -> Mark:
    return Mark(f"8B decode step, {rows} rows: share of read bandwidth", 0.80, 0.93)


def is_shared(load: Load) -> bool:
    """Whether a share of bandwidth is asked of a load: one row of 1,024 tokens is over in a few microseconds."""
    return len(load.kv_lens) > 1


def marks() -> Sequence[Mark]:
    """All of them, in the order of the run."""
    found: list[Mark] = []
    for load in itertools.chain(*decode_loads().values()):
        found += [share_of_decode(load)] if is_shared(load) else []
        found.append(speedup_of_decode(load))
    found += [SPEEDUP_OF_PREFILL, SPEEDUP_OF_INT8]
    found += [share_of_int8(rows, form) for rows in SMALL_ROWS for form in FORMS]
    return [*found, *(share_of_step(rows) for rows in STEP_ROWS)]
