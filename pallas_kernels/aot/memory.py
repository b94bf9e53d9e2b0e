"""Memory of a compiled program: its own account, and copies in the optimised HLO that no account shows."""

import math
import re
from dataclasses import dataclass
from typing import Any, Self

# Bytes an element; what HLO names and this does not know counts as one.
ELEMENT_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
                 "f64": 8, "s64": 8, "u64": 8, "c64": 8}  # fmt: skip
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.<>-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\(")
ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<dims>[\d,]*)\]")
# A fusion that does nothing but move bytes carries one of these in its name.
MOVES = ("copy", "transpose", "bitcast-convert")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, from the compiled program's own analysis."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int

    @classmethod
    def of(cls, compiled: Any) -> Self:
        """compiled: a `jax.stages.Compiled`."""
        stats = compiled.memory_analysis()
        return cls(stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes,
                   stats.alias_size_in_bytes, stats.generated_code_size_in_bytes)  # fmt: skip

    @property
    def peak(self) -> int:
        """What must fit: outputs that lie in donated arguments count once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Copy:
    """An instruction that writes `num_bytes` it only moved. computation: where it is (a while body runs many times)."""

    name: str
    opcode: str
    computation: str
    num_bytes: int
    shape: str


def copies(hlo: str, min_bytes: int) -> tuple[Copy, ...]:
    """Copies and transposes of at least `min_bytes` in optimised HLO (`compiled.as_text()`), loop bodies included.

    Counted are the instructions copy, copy-start (not its -done half) and transpose, and fusions named after them.
    Left out are the insides of fusions, which are no instructions of their own, and what is fetched ahead into a TPU's
    VMEM: that is no second copy in the device's memory.
    """
    fused = set(re.findall(r"calls=%?([\w.-]+)", hlo))
    found = []
    computation = ""
    for line in hlo.splitlines():
        if header := COMPUTATION.match(line):
            computation = header["name"]
        elif (match := INSTRUCTION.match(line)) and computation not in fused and _moves(match["name"], match["opcode"]):
            num_bytes = max((array_bytes(*array.groups()) for array in ARRAY.finditer(match["shape"])), default=0)
            if num_bytes >= min_bytes and not _is_prefetch(match["shape"]):
                found.append(Copy(match["name"], match["opcode"], computation, num_bytes, match["shape"]))
    return tuple(found)


def array_bytes(dtype: str, dims: str) -> int:
    """Bytes of an HLO array such as bf16[8,128], layout padding not counted."""
    elements = math.prod(int(size) for size in dims.split(",") if size)
    return math.ceil(elements * ELEMENT_BYTES.get(dtype, 1))


def dimensions(shape: str) -> tuple[int, ...]:
    """Of the first array of an HLO shape."""
    array = ARRAY.search(shape)
    return tuple(int(size) for size in (array["dims"] if array else "").split(",") if size)


def _is_prefetch(shape: str) -> bool:
    """Whether the first array of a shape, the one written, lies in memory space 1, which is VMEM."""
    return "S(1)" in shape.removeprefix("(").partition("}")[0]


def _moves(name: str, opcode: str) -> bool:
    if opcode in ("copy", "copy-start", "transpose"):
        return True
    # "copy_fusion", "transpose_copy_fusion.3": every part of the name before "fusion" is a move.
    parts = [part for part in re.split(r"[_.\d]+", name) if part]
    return opcode == "fusion" and parts[-1:] == ["fusion"] and len(parts) > 1 and all(p in MOVES for p in parts[:-1])
