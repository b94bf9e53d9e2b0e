"""A reader of optimised HLO text: computations, instructions, shapes with their memory space and padding.

It knows the grammar as far as counting needs it (openxla.org/xla/operation_semantics, shapes.md and tiled_layout.md).
"""

import math
import re
from dataclasses import dataclass, field

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
}  # fmt: skip
"""Bits an element; what is not here (tokens, opaque) has no bytes."""

ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
TILE = re.compile(r"T(?:\(([\d,]+)\))")
MEMORY_SPACE = re.compile(r"S\((\d+)\)")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
COMMENT = re.compile(r"/\*.*?\*/")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of a shape. layout: dimensions from minor to major. tile: of the minor dimensions, major first.

    space: 0 is the device's main memory (HBM); on TPUs 1 is VMEM and 2 holds semaphores.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, those included that fill up tiles."""
        sizes = [self.dims[axis] for axis in self.layout] if self.layout else list(reversed(self.dims))
        for place, tile in enumerate(reversed(self.tile)):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // tile) * tile
        return math.prod(sizes) * BITS.get(self.dtype, 0) // 8

    @property
    def hbm_bytes(self) -> int:
        """`num_bytes` of an array in main memory, else 0."""
        return 0 if self.space else self.num_bytes


@dataclass(frozen=True)
class Instruction:
    """arrays: of the result, tuples flattened. index: of a parameter or get-tuple-element, else None.

    called: names of the computations it runs. text: the whole line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str
    index: int | None = None

    @property
    def hbm_bytes(self) -> int:
        return sum(array.hbm_bytes for array in self.arrays)

    def called_as(self, role: str) -> str | None:
        """The computation after `role=`: "body", "condition", "calls"."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.text)
        return found[1] if found else None


@dataclass
class Computation:
    """Instructions by name, in their order; the last one marked ROOT is the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def users(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions.values() if name in each.operands]

    def parameter(self, index: int) -> Instruction:
        return next(each for each in self.instructions.values() if each.opcode == "parameter" and each.index == index)


@dataclass
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The module of `jax.stages.Compiled.as_text()`. Raises ValueError when no entry is found."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            instruction = parse_instruction(found[2], found[3])
            current.instructions[instruction.name] = instruction
            current.root = instruction.name if found[1] else current.root
    if not entry:
        raise ValueError("the text holds no ENTRY computation: it is no optimised HLO module")
    return Module(computations, entry)


def parse_instruction(name: str, rest: str) -> Instruction:
    """`rest`: what stands behind the equals sign."""
    rest = COMMENT.sub("", rest)
    end = closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"no opcode in: {name} = {rest[:200]}")
    close = closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close - 1]
    attributes = rest[close:].split(", metadata=")[0]
    index = re.search(r"index=(\d+)", attributes)
    number = int(inside) if opcode[1] == "parameter" else int(index[1]) if index else None
    called = tuple(re.findall(r"[\w.\-]+", " ".join(CALLED.findall(attributes))))
    return Instruction(name, opcode[1], arrays(rest[:end]), operand_names(inside), called, rest, number)


def closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced parentheses in: {text[start : start + 200]}")


def operand_names(inside: str) -> tuple[str, ...]:
    """Names between an opcode's parentheses; the shapes that older text repeats before them are left out."""
    return tuple(re.findall(r"%([\w.\-]+)", inside))


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text, tuples flattened."""
    return tuple(parse_array(*found.groups()) for found in ARRAY.finditer(shape) if found[1] in BITS)


def parse_array(dtype: str, dims: str, layout: str | None, more: str | None) -> Array:
    tile, space = TILE.search(more or ""), MEMORY_SPACE.search(more or "")
    return Array(dtype, numbers(dims), numbers(layout), numbers(tile[1] if tile else ""), int(space[1]) if space else 0)


def numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in (text or "").split(",") if number)
