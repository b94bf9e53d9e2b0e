"""The machine code of a TPU kernel, as libtpu writes it: its loops and branches, and how full their bundles are.

A bundle is what a core issues in one cycle, at best: waiting for a DMA, for the matrix unit or for the transcendental
unit is not in the file. So bundles times trips are a lower bound of the cycles. Everything here is predicted.

The format is nowhere specified. What is relied on was seen in the dumps of libtpu 0.0.48 for v5e, v6e, v5p and tpu7x:

    0x67 LB: >>> { ...bundle...  ;;  ... }  /* Start region 131 :: ... */
    0x6c   : >> { %221 = sbr.rel (!%p218_p3) target = $region131 }

A branch back is a loop, a branch forward a part that may be skipped; behind a branch a few bundles run in any case (its
delay slots). Files are read by their structure, not by the names of registers or passes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DUMP_NAME = re.compile(r"^(?P<time>\d+)-(?P<kernel>.+)-\d+-final_bundles\.txt$")
BUNDLE = re.compile(r"^[ \t]*(?:0x)?([0-9a-f]+)[ \t]+(?:[A-Z]{2})?[ \t]*:[ >\t]*\{", re.MULTILINE)
STARTED = re.compile(r"Start(?:/End empty)? region (\d+)")
ENDED = re.compile(r"(?<!/)End region (\d+)")
EXIT = "/* exit bundle"
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
BRANCH = re.compile(r"sbr\.\w+ (?:\((?P<negated>!?)%(?P<predicate>\w+)\) )?target = \$region(?P<region>\d+)")
SPILL, FILL, MATRIX, VECTOR, LOAD, STORE = "VSTORE:SPILL", "VLOAD:FILL", "MXU", "VALU", "VLOAD", "VSTORE"
# Bundles that run behind a branch whether it is taken or not; None: each branch has its own (`delay_slots_end`).
DELAY_SLOTS = {"v5e": 4, "v6e": 4, "v5p": 4, "tpu7x": None}
MOST_DELAY_SLOTS = 6


class UnknownFormat(Exception):
    """A dump does not look as described above; says where."""


@dataclass(frozen=True)
class Branch:
    """A conditional jump at bundle `index` to bundle `target`, taken when the predicate is not `negated`; `last` is its
    last delay slot.
    """

    index: int
    last: int
    target: int
    predicate: str | None
    negated: bool


@dataclass(frozen=True)
class Region:
    """Bundles first .. last: the kernel, one pass of a loop, or what a branch may skip.

    bundles and use count what is in no inner region; use maps a slot to the instructions in it.
    """

    kind: Literal["kernel", "loop", "branch"]
    first: int
    last: int
    bundles: int
    use: dict[str, int]
    regions: tuple["Region", ...]

    @property
    def all_bundles(self) -> int:
        return self.last - self.first + 1

    def walk(self) -> Iterator["Region"]:
        """This one and all inside, outermost first."""
        yield self
        for region in self.regions:
            yield from region.walk()

    def total(self, slot: str) -> int:
        """Instructions in `slot`, inner regions included."""
        return sum(region.use.get(slot, 0) for region in self.walk())

    @property
    def loops(self) -> tuple["Region", ...]:
        """The loops directly in this one, those under branches included, in order."""
        inner = ((region,) if region.kind == "loop" else region.loops for region in self.regions)
        return tuple(loop for loops in inner for loop in loops)

    @property
    def depth(self) -> int:
        """Loops inside each other, this one not counted."""
        return max((loop.depth + 1 for loop in self.loops), default=0)


@dataclass(frozen=True)
class Schedule:
    """A compiled kernel. capacity: how many instructions a bundle can hold, by slot; utilization: of each bundle, and
    texts: as written, comments included.
    """

    kernel: str
    texts: tuple[str, ...]
    capacity: dict[str, int]
    utilization: tuple[dict[str, int], ...]
    branches: tuple[Branch, ...]
    root: Region

    @property
    def hot_loop(self) -> Region:
        """Of all loops the one with most bundles outside of its inner loops; the kernel itself without loops. Which one
        runs most often depends on lengths (`tpu_execution`).
        """
        loops = [region for region in self.root.walk() if region.kind == "loop"]
        return max(loops or [self.root], key=lambda loop: loop.all_bundles - sum(x.all_bundles for x in loop.loops))

    def fill(self, slot: str, region: Region) -> float:
        """Share of a slot's capacity in use, over all bundles of a region."""
        return region.total(slot) / (self.capacity[slot] * region.all_bundles)

    def spilling(self, region: Region) -> float:
        """Share of a region's bundles that store a spilled vector register."""
        lines = self.utilization[region.first : region.last + 1]
        return sum(line[SPILL] > 0 for line in lines) / len(lines)


def collect(folder: Path | str, chip: str) -> list[Schedule]:
    """All kernels and fusions dumped into a folder, oldest first; what libtpu puts around them is left out.

    chip: as in `targets` ("v6e"); it decides the delay slots.
    """
    matches = [(match, path) for path in Path(folder).iterdir() if (match := DUMP_NAME.match(path.name))]
    wanted = [(match, path) for match, path in matches if _is_kernel(match["kernel"])]
    wanted.sort(key=lambda found: (int(found[0]["time"]), found[0]["kernel"]))
    return [read(path, match["kernel"], DELAY_SLOTS[chip]) for match, path in wanted]


def read(path: Path, kernel: str, delay_slots: int | None) -> Schedule:
    """The schedule in a `*-final_bundles.txt`, with the utilisation that lies beside it."""
    stem = re.sub(r"\d+-final_bundles\.txt$", "", path.name)
    beside = [p for p in path.parent.iterdir() if p.name.startswith(stem) and "final_hlo-static-per-bundle" in p.name]
    if len(beside) != 1:
        raise UnknownFormat(f"{path.name}: {len(beside)} files of utilisation beside it, expected one")
    return parse(kernel, path.read_text(), beside[0].read_text(), delay_slots)


def parse(kernel: str, bundles_text: str, utilization_text: str, delay_slots: int | None) -> Schedule:
    """delay_slots: see DELAY_SLOTS. Raises UnknownFormat."""
    capacity, utilization = parse_utilization(utilization_text)
    texts = bundle_texts(bundles_text)
    if len(texts) != len(utilization):
        raise UnknownFormat(f"{kernel}: {len(texts)} bundles, but utilisation of {len(utilization)}")
    branches = find_branches(texts, delay_slots)
    root = nest(branches, utilization)
    return Schedule(kernel, tuple(texts), capacity, utilization, branches, root)


def bundle_texts(text: str) -> list[str]:
    """The text of each bundle, from its brace to the next bundle; comments may span lines."""
    found = list(BUNDLE.finditer(text))
    if not found:
        raise UnknownFormat("no bundles")
    for index, match in enumerate(found):
        if int(match[1], 16) != index:
            raise UnknownFormat(f"bundle {match[1]} where {index:x} was expected")
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [text[match.end() - 1 : end] for match, end in zip(found, ends, strict=True)]


def parse_utilization(text: str) -> tuple[dict[str, int], tuple[dict[str, int], ...]]:
    """(capacity, use of each bundle) by slot, from a line of names, a line of capacities and one line a bundle."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("==")]
    if len(lines) < 2:
        raise UnknownFormat("no slots in the file of utilisation")
    names = [name.strip() for name in lines[0].split(",")]
    rows = [[int(number) for number in line.split()] for line in lines[1:]]
    if not {SPILL, FILL, MATRIX, VECTOR, LOAD, STORE} <= set(names) or any(len(row) != len(names) for row in rows):
        raise UnknownFormat(f"slots {names} are not those known, or a line has not one number each")
    table = [dict(zip(names, row, strict=True)) for row in rows]
    return table[0], tuple(table[1:])


def find_branches(texts: list[str], delay_slots: int | None) -> tuple[Branch, ...]:
    """Every jump, its region resolved to the bundle where a comment starts that region."""
    starts: dict[int, int] = {}
    for index, text in enumerate(texts):
        for region in STARTED.findall(text):
            starts.setdefault(int(region), index)
    branches = []
    for index, text in enumerate(texts):
        for match in BRANCH.finditer(COMMENT.sub("", text)):
            region = int(match["region"])
            if region not in starts and EXIT in texts[-1]:
                starts[region] = len(texts) - 1  # the second core of a v5p leaves at once
            if region not in starts:
                raise UnknownFormat(f"bundle {index:#x} branches to region {region}, which starts nowhere")
            last = delay_slots_end(texts, index, region, starts) if delay_slots is None else index + delay_slots
            branches.append(Branch(index, last, starts[region], match["predicate"], bool(match["negated"])))
    return tuple(branches)


def delay_slots_end(texts: list[str], index: int, target: int, starts: dict[int, int]) -> int:
    """The last delay slot of a tpu7x's branch at `index`: 1 to MOST_DELAY_SLOTS were seen; dumps do not say how many.

    A loop's are all bundles up to the next region. A branch forward has one, and more where what stands before it ends
    behind it: a region other than the one that is skipped, which is numbered just before the target.
    """
    behind = range(index + 1, len(texts))
    next_region = next((after for after in behind if STARTED.search(texts[after])), len(texts))
    if starts[target] <= index:
        return next_region - 1
    ends = [
        after
        for after in range(index + 1, min(next_region, index + 1 + MOST_DELAY_SLOTS))
        for ended in [{int(region) for region in ENDED.findall(texts[after])}]
        if target - 1 not in ended and any(starts.get(region, index + 1) <= index for region in ended)
    ]
    return max([index + 1, *ends])


def nest(branches: tuple[Branch, ...], utilization: tuple[dict[str, int], ...]) -> Region:
    """The tree of loops (branches back) and of what branches forward skip."""
    found: list[tuple[int, int, Literal["loop", "branch"]]] = []
    for branch in branches:
        if branch.target <= branch.index:
            found.append((branch.target, branch.last, "loop"))
        elif branch.target > branch.last + 1:
            found.append((branch.last + 1, branch.target - 1, "branch"))
    found.sort(key=lambda span: (span[0], -span[1]))
    return _region("kernel", 0, len(utilization) - 1, found, utilization)


def _region(kind, first: int, last: int, found: list, utilization: tuple[dict[str, int], ...]) -> Region:
    """Takes from the front of `found`, outermost first, what lies in first .. last."""
    inner = []
    while found and found[0][0] <= last:
        start, end, inner_kind = found.pop(0)
        if end > last:
            raise UnknownFormat(f"{inner_kind} {start:#x} .. {end:#x} is partly outside {first:#x} .. {last:#x}")
        inner.append(_region(inner_kind, start, end, found, utilization))
    own = set(range(first, last + 1)) - {index for region in inner for index in range(region.first, region.last + 1)}
    use = {slot: sum(utilization[index][slot] for index in own) for slot in utilization[first]}
    return Region(kind, first, last, len(own), use, tuple(inner))


def _is_kernel(name: str) -> bool:
    # "TLP" is the program that calls the kernels, "<late-initialization>" and the like belong to every program.
    return name != "TLP" and not name.startswith("<")
