"""HBM bytes that a compiled program moves, counted from its optimised HLO.

An instruction outside fusions reads its operands and writes its results, as far as they lie in main memory. What a
fusion only slices or gathers from is read by the slice; what it updates in place is written by the update. A loop's
body counts as often as it runs when the program knows that, else once (a decode program's loop of rounds: so the count
is that of one round). Kernels count by a formula of the caller's.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.aot.hlo import Array, Computation, Instruction, Module

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "add-dependency", "rng-get-and-update-state",
}  # fmt: skip
"""Instructions that move nothing by themselves."""
VIEWS = {"bitcast", "get-tuple-element", "tuple", "opt-barrier"}
SLICES = {"dynamic-slice", "slice", "gather"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcodes that write a part of their first operand, and which operand holds that part."""
MOVES = {
    "parameter", "constant", "copy", "bitcast", "dynamic-slice", "slice", "transpose", "convert", "reshape",
    "concatenate", "tuple", "get-tuple-element", "broadcast", "pad",
}  # fmt: skip
"""Opcodes that only carry data: a computation of nothing else is a copy, whatever its name."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

type KernelBytes = Callable[[Instruction, Computation], int | None]


@dataclass(frozen=True)
class Item:
    """One instruction's bytes: `each` time it runs, and how often that is."""

    name: str
    opcode: str
    each: int
    times: int

    @property
    def total(self) -> int:
        return self.each * self.times


def count(module: Module, kernel_bytes: KernelBytes = lambda instruction, computation: None) -> list[Item]:
    """Every instruction that moves bytes, largest total first.

    kernel_bytes: HBM bytes of a custom call, or None to count its operands and results.
    """
    found = [
        Item(instruction.name, instruction.opcode, moved(instruction, computation, module, kernel_bytes), times)
        for computation, instruction, times in running(module)
    ]
    return sorted((item for item in found if item.each), key=lambda item: -item.total)


def running(module: Module) -> Iterator[tuple[Computation, Instruction, int]]:
    """Instructions outside fusions that a run executes, with their computation and how often they run."""
    yield from walk(module, module.entry, 1)


def walk(module: Module, name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        yield computation, instruction, times
        if instruction.opcode == "while":
            trips = trip_count(instruction, module) or 1
            for role in ("body", "condition"):
                yield from walk(module, instruction.called_as(role) or "", times * trips)
        elif instruction.opcode in ("conditional", "call", "async-start"):
            for called in instruction.called:
                yield from walk(module, called, times)


def trip_count(loop: Instruction, module: Module) -> int | None:
    """How often a while loop runs: as the compiler notes it, or the constant its counter is compared with; None when
    that is only known at run time.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if noted:
        return int(noted[1])
    condition = module.computations[loop.called_as("condition") or ""]
    root = condition.instructions[condition.root]
    if root.opcode == "fusion" and len(root.operands) <= 2:
        inner = module.computations[root.called[0]]
        root = inner.instructions[inner.root]
        condition = inner
    if root.opcode != "compare" or "direction=LT" not in root.text:
        return None
    limits = [re.search(r" constant\((\d+)\)", condition.instructions[name].text) for name in root.operands]
    return next((int(limit[1]) for limit in limits if limit), None)


def moved(instruction: Instruction, computation: Computation, module: Module, kernel_bytes: KernelBytes) -> int:
    """HBM bytes that one run of an instruction outside fusions reads and writes."""
    opcode = instruction.opcode
    if (
        opcode in FREE
        or opcode in ("while", "conditional", "call", "async-start")
        or opcode.endswith(("-done", "-update"))
    ):
        return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode == "custom-call":
        known = kernel_bytes(instruction, computation)
        if known is not None:
            return known
    if opcode == "fusion":
        body = module.computations[instruction.called[0]]
        read = sum(read_of(body, index, operand, module) for index, operand in enumerate(operands))
        return read + written_by(body, body.root, instruction.arrays, module)
    if opcode in UPDATES:
        return 2 * operands[UPDATES[opcode]].hbm_bytes + sum(each.hbm_bytes for each in operands[2:3])
    if opcode in SLICES:
        return sliced(instruction, operands[0]) + instruction.hbm_bytes
    if opcode.removesuffix("-start") in ("copy", "slice", "dynamic-slice"):
        # The result of a start is (destination, source, context), and only the destination's size is moved.
        target = instruction.arrays[0] if opcode.startswith("copy") else instruction.arrays[-2]
        return target.hbm_bytes + (0 if all(each.space for each in operands[0].arrays) else target.num_bytes)
    results = instruction.hbm_bytes
    if opcode.endswith("-start"):  # a collective's start repeats its operands in its result
        results = max(results - sum(operand.hbm_bytes for operand in operands), 0)
    return results + sum(operand.hbm_bytes for operand in operands)


def sliced(instruction: Instruction, source: Instruction) -> int:
    """Bytes that a slice or gather reads: as many as it gives, if the source lies in main memory."""
    return sum(array.num_bytes for array in instruction.arrays) if source.hbm_bytes else 0


def read_of(body: Computation, index: int, operand: Instruction, module: Module) -> int:
    """Bytes that a fusion reads of its operand `index`."""
    whole = operand.hbm_bytes
    if not whole or len(operand.arrays) != 1:
        return whole
    return min(whole, used(body, body.parameter(index).name, whole, module))


def used(body: Computation, name: str, whole: int, module: Module, beyond: Callable[[], int] | None = None) -> int:
    """Bytes of the value `name`, `whole` in all, that the instructions of a fused computation need.

    beyond: what is used of the computation's result; None where that leaves the fusion.
    """
    total = 0
    if name == body.root:
        total = whole if beyond is None else beyond()
    for user in body.users(name):
        places = [place for place, operand in enumerate(user.operands) if operand == name]
        if user.opcode in VIEWS:
            total += used(body, user.name, whole, module, beyond)
        elif user.opcode in SLICES and places == [0]:
            total += sum(array.num_bytes for array in user.arrays)
        elif user.opcode == "fusion":
            inner = module.computations[user.called[0]]
            after = partial(used, body, user.name, whole, module, beyond)
            total += sum(used(inner, inner.parameter(place).name, whole, module, after) for place in places)
        elif user.opcode not in UPDATES or places != [0]:
            return whole
    return total


def written_by(body: Computation, name: str, results: tuple[Array, ...], module: Module) -> int:
    """Bytes that a fusion writes to its results, which the value `name` of its computation holds."""
    value = body.instructions[name]
    if value.opcode == "tuple":
        parts = [body.instructions[operand] for operand in value.operands]
        if all(len(part.arrays) == 1 for part in parts):
            return sum(
                written_by(body, part.name, (result,), module) for part, result in zip(parts, results, strict=True)
            )
    if value.opcode == "bitcast":
        return written_by(body, value.operands[0], results, module)
    if value.opcode == "fusion":
        inner = module.computations[value.called[0]]
        return written_by(inner, inner.root, results, module)
    if value.opcode in UPDATES and not results[0].space:
        return sum(array.num_bytes for array in body.instructions[value.operands[UPDATES[value.opcode]]].arrays)
    return sum(result.hbm_bytes for result in results)


def copies(
    module: Module, weights: set[tuple[str, tuple[int, ...]]], stream: tuple[int, ...] | None = None
) -> list[str]:
    """Instructions that carry a whole weight, or all pages, to another place in main memory.

    weights: dtype in HLO's name and sorted dimensions above 1, of every array that must not be copied.
    stream: dimensions of the residual stream, which may be copied as it is (its size may be a weight's, turned).
    """
    found = []
    for _, instruction, _ in running(module):
        if not is_move(instruction, module):
            continue
        if instruction.opcode in ("copy", "copy-start") and instruction.arrays[0].dims == stream:
            continue
        written = [array for array in instruction.arrays[:1] if not array.space]
        found += [instruction.name for array in written if signature(array.dtype, array.dims) in weights]
    return found


def signature(dtype: str, dims: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """What a copy of an array keeps, in whatever order its dimensions lie."""
    return dtype, tuple(sorted(size for size in dims if size > 1))


def is_move(instruction: Instruction, module: Module) -> bool:
    if instruction.opcode == "fusion":
        body = module.computations[instruction.called[0]]
        return all(each.opcode in MOVES or is_move(each, module) for each in body.instructions.values())
    return instruction.opcode in ("copy", "copy-start", "transpose", "dynamic-slice", "concatenate", "convert", "slice")


def collectives(module: Module) -> dict[str, int]:
    """How often each kind of collective runs, those inside fusions included."""
    counts: dict[str, int] = {}
    for _, instruction, times in running(module):
        inside = module.computations[instruction.called[0]] if instruction.opcode == "fusion" else None
        for each in inside.instructions.values() if inside else (instruction,):
            kind = each.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                counts[kind] = counts.get(kind, 0) + times
    return counts
