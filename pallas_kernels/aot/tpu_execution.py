"""How often each bundle of a TPU kernel runs, and what its DMAs move, for given scalar operands.

Loops of such a kernel depend on lengths that lie in scalar memory. Instead of a formula for each kernel this executes
the scalar half of the machine code itself: registers, predicates, scalar memory, branches. Vectors, waits and bounds
checks are skipped; a branch that would need a vector's value is an error. What the instructions do was inferred from
dumps of kernels whose loops are known, which the tests repeat.

Within a bundle everything is read before anything is written. Numbers are unsigned 32 bits.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pallas_kernels.aot.tpu_schedule import COMMENT, Branch, Region, Schedule, UnknownFormat

INSTRUCTION = re.compile(r"^%(?P<result>\w+) = (?P<opcode>[\w.]+)(?:<[\w ]+>)? ?(?P<operands>.*)$", re.DOTALL)
PREDICATE = re.compile(r"\((?P<negated>!?)%(?P<register>\w+?)(?:, (?P<old>%\w+))?\)")
REGISTER = re.compile(r"%\w+_(?P<physical>[sp]\d+)$")
ADDRESS = re.compile(r"\[(?:smem:)?\[?(?P<parts>[^\]]+)\]?\]")
OPERAND = re.compile(r"\[shape: \w+\[[\d,]*\], index: (?P<index>\d+)")
DIVISION = re.compile(r"/\*\s*(kDivAndRem|kDiv|kRem)\s*\*/")
MASK = 0xFFFFFFFF
# DMAs count granules; operand k is given the granules from (k + 1) << 24. Addresses are in 16 granules on some chips,
# and shifted left by 4 before a DMA: those in VMEM on all, those in HBM where they are cast to pointers (v5e, v6e).
GRANULE_SHIFT, ADDRESS_SHIFT = 24, 4
GRANULE_BYTES = 32
LANES = 128
MAX_BLOCKS = 50_000_000


def _signed(value: int) -> int:
    return value - (1 << 32) if value & 0x80000000 else value


ARITHMETIC: dict[str, str] = {
    "sadd.s32": "({0} + {1}) & MASK",
    "ssub.s32": "({0} - {1}) & MASK",
    "smul.u32": "({0} * {1}) & MASK",
    "sshll.u32": "({0} << ({1} & 31)) & MASK if {1} < 32 else 0",
    "sshrl.u32": "{0} >> {1} if {1} < 32 else 0",
    "sshra.s32": "(signed({0}) >> min({1}, 31)) & MASK",
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
    "smin.u32": "min({0}, {1})",
    "smax.u32": "max({0}, {1})",
    "smin.s32": "min({0}, {1}, key=signed)",
    "smax.s32": "max({0}, {1}, key=signed)",
    "sclz": "32 - ({0}).bit_length()",
    "smov": "{0}",
    "scalar_select": "({1} if {0} else {2})",
    "por": "{0} or {1}",
    "pand": "{0} and {1}",
    "pxor": "{0} != {1}",
    "pnand": "not ({0} and {1})",
    "pnor": "not ({0} or {1})",
    "pneg": "not {0}",
    "pmov": "{0}",
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Aliases of one register (a phi, a pointer's type) and what cannot change the path.
ALIASES = ("sphi", "int_to_ptr.", "pphi")
IGNORED = ("sbr.", "shalt.", "vsync", "sfence", "dma.done", "sdelay", "snop", "strace", "vtrace", "vst", "vld",
           "setreg", "sset")  # fmt: skip


@dataclass(frozen=True)
class Execution:
    """counts: how often each bundle ran; bytes_in and bytes_out: moved by DMA from HBM and to HBM."""

    counts: tuple[int, ...]
    bytes_in: int
    bytes_out: int

    @property
    def bundles(self) -> int:
        """Bundles issued: a lower bound of the cycles."""
        return sum(self.counts)

    def runs(self, region: Region) -> int:
        """How often a region was begun (a loop: its passes)."""
        return self.counts[region.first]


@dataclass
class _Machine:
    """State while executing; registers are the keys "s12" and "p3"."""

    registers: dict[str, Any]
    operands: Mapping[int, np.ndarray]
    memory: dict[int, int] = field(default_factory=dict)
    fifos: dict[str, list[int]] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0

    def divide(self, fifo: str, kind: str, numerator: int, denominator: int) -> None:
        quotient, remainder = divmod(numerator, denominator) if denominator else (MASK, numerator)
        self.fifos[fifo] = {"kDiv": [quotient], "kRem": [remainder], "kDivAndRem": [quotient, remainder]}[kind]

    def pop(self, fifo: str) -> int:
        return self.fifos[fifo].pop(0)

    def to_scalar_memory(self, source: int, granules: int, destination: int) -> None:
        """A DMA of 32-bit words from an operand; offsets count granules of it."""
        index, offset = (source >> GRANULE_SHIFT) - 1, source & ((1 << GRANULE_SHIFT) - 1)
        if index not in self.operands:
            return  # no value was given: only addresses come from there
        words = self.operands[index][offset * GRANULE_BYTES // 4 :][: granules * GRANULE_BYTES // 4]
        self.memory.update(zip(range(destination, destination + len(words)), words.tolist(), strict=True))


def execute(schedule: Schedule, operands: Mapping[int, Any]) -> Execution:
    """Runs a kernel once.

    Args:
      schedule: from `tpu_schedule.collect`.
      operands: integer arrays by the operand's index (`kernel_operands`); those without a value count as addresses.

    Raises:
      UnknownFormat: for a scalar instruction that is not known, or when the program does not end.
    """
    values = {index: _words(np.asarray(value)) for index, value in operands.items()}
    machine = _Machine(defaultdict(int), values)
    blocks = _blocks(schedule)
    counts = np.zeros(len(schedule.texts), np.int64)
    runs: dict[int, int] = dict.fromkeys(blocks, 0)
    position = 0
    for _ in range(MAX_BLOCKS):
        runs[position] += 1
        block = blocks[position]
        position = block.run(machine, machine.registers)
        if position >= len(schedule.texts):
            break
    else:
        raise UnknownFormat(f"{schedule.kernel} has not ended after {MAX_BLOCKS} blocks")
    for start, times in runs.items():
        counts[start : blocks[start].end] += times
    return Execution(tuple(counts.tolist()), machine.bytes_in, machine.bytes_out)


@dataclass(frozen=True)
class _Block:
    """Bundles that run together; `run` executes them and returns where to go on."""

    end: int
    run: Callable[[_Machine, dict[str, Any]], int]


def _without_cookies(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Before they begin, the two cores of a v5p compare a number: it comes from the other core (`vpop.ccrf`) through a
    vector register, and only a halt depends on it. 0 stands for it.
    """
    found = re.findall(r"%(\w+) = vpop\.ccrf", "\n".join(texts))
    pushed = {name for text in texts for name, vector in re.findall(r"%(\w+) = vpush %(\w+)", text) if vector in found}
    return tuple(re.sub(r"spop %(\w+)", lambda m: "smov 0" if m[1] in pushed else m[0], text) for text in texts)


def _blocks(schedule: Schedule) -> dict[int, _Block]:
    """By first bundle. A block ends with a branch's delay slots, or where another branch lands."""
    texts = _without_cookies(schedule.texts)
    behind = {branch.last + 1: branch for branch in schedule.branches}
    starts = sorted({0, *behind, *(branch.target for branch in schedule.branches)} - {len(texts)})
    for branch in schedule.branches:
        inside = [start for start in starts if branch.index < start <= branch.last]
        if inside or sum(other.index == branch.index for other in schedule.branches) > 1:
            raise UnknownFormat(
                f"{schedule.kernel}: a second branch at bundle {branch.index:#x} or into its delay slots"
            )
    ends = [*starts[1:], len(texts)]
    hbm_shift = GRANULE_SHIFT - ADDRESS_SHIFT * any("int_to_ptr.hbm" in text for text in texts)
    return {start: _Block(end, _translate(start, texts[start:end], behind.get(end), end, hbm_shift))
            for start, end in zip(starts, ends, strict=True)}  # fmt: skip


def _translate(
    start: int, texts: tuple[str, ...], branch: Branch | None, end: int, hbm_shift: int
) -> Callable[..., int]:
    """Python source of a block, compiled: reads of a bundle into locals, then its writes."""
    lines = ["def run(machine, r):"]
    for index, text in enumerate(texts, start):
        reads, writes = _bundle(text, index, hbm_shift)
        if branch is not None and branch.index == index and branch.predicate is not None:
            reads.append(f"taken = {'not ' if branch.negated else ''}{_value('%' + branch.predicate)}")
        lines += [f"    {line}" for line in (*reads, *writes)]
    if branch is None:
        lines.append(f"    return {end}")
    elif branch.predicate is None:
        lines.append(f"    return {branch.target}")
    else:
        lines.append(f"    return {branch.target} if taken else {end}")
    scope: dict[str, Any] = {"MASK": MASK, "signed": _signed}
    exec("\n".join(lines), scope)  # noqa: S102 (source made here, of numbers, register names and the table above)
    return scope["run"]


def _bundle(text: str, index: int, hbm_shift: int) -> tuple[list[str], list[str]]:
    """Statements that read and statements that write, of one bundle."""
    reads: list[str] = []
    writes: list[str] = []
    body = COMMENT.sub("", DIVISION.sub(r"\1", text)).strip().removeprefix("{")
    body = body[: body.rindex("}")] if "}" in body else body
    for number, instruction in enumerate(body.split(";;")):
        match = INSTRUCTION.match(instruction.strip())
        if match is None:
            continue
        statement = _statement(match, f"t{number}", index, hbm_shift)
        if statement is None:
            continue
        condition, expression, write = statement
        if match["opcode"].startswith("inlined_call_operand"):
            reads.insert(0, write)  # in its register from the start, though another instruction here may write that
            continue
        if condition:
            reads.append(f"c{number} = {condition}")
        if expression:
            reads.append(f"t{number} = {expression}" + (f" if c{number} else None" if condition else ""))
        writes.append(f"if c{number}: {write}" if condition else write)
    return reads, writes


def _statement(match: re.Match[str], name: str, index: int, hbm_shift: int) -> tuple[str, str, str] | None:
    """(condition, expression read first, statement that writes `name`) of an instruction; None for one to skip."""
    opcode, text = match["opcode"], match["operands"]
    predicate = PREDICATE.search(text)
    condition = ""
    if predicate is not None:
        condition = ("not " if predicate["negated"] else "") + _value("%" + predicate["register"])
        text = (text[: predicate.start()] + text[predicate.end() :]).strip().lstrip(",").strip()
    if opcode.startswith("inlined_call_operand"):
        return _operand(match, text, hbm_shift)
    if opcode in ("sld", "sst"):
        return _memory(match, opcode, text, condition, name)
    if opcode.startswith("dma.") and not opcode.startswith("dma.done"):
        return _dma(opcode, text, condition, name)
    if opcode == "sdivrem.u32":
        left, right = _arguments(text)
        kind = text.split()[-1]
        return condition, f"({left}, {right})", f"machine.divide({match['result']!r}, {kind!r}, *{name})"
    register = REGISTER.match("%" + match["result"])
    if register is None or opcode.startswith((*ALIASES, *IGNORED)):
        return None
    written = f"r[{register['physical']!r}] = {name}"
    if opcode == "spop.drf":
        return condition, f"machine.pop({text.strip().removeprefix('%')!r})", written
    if opcode.startswith(("vpop.sfrf", "scvt.")) or opcode.endswith(".f32"):
        return condition, "0", written  # a semaphore's left-over, or a float, which goes to vectors only
    return condition, _expression(opcode, text, index), written


def _expression(opcode: str, text: str, index: int) -> str:
    if opcode not in ARITHMETIC and not opcode.startswith(("scalar_lea.", "scmp.")):
        raise UnknownFormat(f"bundle {index:#x}: the scalar instruction {opcode} {text} is not known")
    arguments = _arguments(text)
    if opcode.startswith("scalar_lea."):
        return f"({' + '.join(arguments[:2])}) & MASK"
    if opcode.startswith("scmp."):
        _, comparison, kind, *_ = opcode.split(".")
        left, right = (f"signed({each})" if kind == "s32" else each for each in arguments)
        return f"{left} {COMPARISONS[comparison]} {right}"
    return ARITHMETIC[opcode].format(*arguments)


def _operand(match: re.Match[str], text: str, hbm_shift: int) -> tuple[str, str, str] | None:
    """Where an operand lies; one without a memory is a number itself."""
    register, described = REGISTER.match("%" + match["result"]), OPERAND.search(text)
    if register is None or described is None:
        return None
    index = int(described["index"])
    shift = hbm_shift if match["opcode"].endswith(".hbm") else GRANULE_SHIFT - ADDRESS_SHIFT
    value = f"{(index + 1) << shift}"
    if "<no memory space>" in match[0]:
        value = f"int(machine.operands[{index}][0]) if {index} in machine.operands else 0"
    return "", "", f"r[{register['physical']!r}] = {value}"


def _memory(match: re.Match[str], opcode: str, text: str, condition: str, name: str) -> tuple[str, str, str]:
    """Loads and stores of scalar memory; words nobody wrote are 0 (the number of the core is one)."""
    address = ADDRESS.search(text)
    if address is None:
        raise UnknownFormat(f"no address in {opcode} {text}")
    where = _sum(address["parts"])
    if opcode == "sld":
        register = REGISTER.match("%" + match["result"])
        assert register is not None  # noqa: S101 (a load has a scalar result)
        return condition, f"machine.memory.get({where}, 0)", f"r[{register['physical']!r}] = {name}"
    (value,) = _arguments(text[address.end() :])
    return condition, f"({where}, {value})", f"machine.memory[{name}[0]] = {name}[1]"


def _dma(opcode: str, text: str, condition: str, name: str) -> tuple[str, str, str] | None:
    """Bytes are counted, and words go to scalar memory; sources and destinations in HBM count, others do not."""
    source, granules, destination, *_ = _arguments(re.sub(r"\[thread:\$\d+\]", "", text))
    if opcode.endswith("_to_smem"):
        return condition, f"({source}, {granules}, {destination})", f"machine.to_scalar_memory(*{name})"
    if opcode.startswith("dma.hbm_to_"):
        return condition, granules, f"machine.bytes_in += {name} * {GRANULE_BYTES}"
    if opcode.endswith("_to_hbm"):
        return condition, granules, f"machine.bytes_out += {name} * {GRANULE_BYTES}"
    return None


def _arguments(text: str) -> list[str]:
    """Python expressions of the operands: registers, numbers, addresses of allocations."""
    parts = re.findall(r"\[[^\]]*\]+|[^\s,]+", text)
    values = [
        _value(part) for part in parts if part.startswith(("%", "[#")) or re.fullmatch(r"\d+|\$?0x[0-9a-f]+", part)
    ]
    return values


def _value(text: str) -> str:
    """A register, a number or an allocation's address."""
    if register := REGISTER.match(text):
        return f"r[{register['physical']!r}]"
    if text.startswith("["):
        return _sum(text.strip("[]"))
    if re.fullmatch(r"\d+", text):
        return text
    if re.fullmatch(r"\$?0x[0-9a-f]+", text):
        return str(int(text.removeprefix("$"), 16))
    raise UnknownFormat(f"{text!r} is no scalar operand")


def _sum(text: str) -> str:
    """`#allocation4 + %s1030_s6 + $0x1`: each allocation has addresses of its own, counted in words."""
    parts = [part.strip() for part in text.split("+")]
    terms = [_allocation(part) if part.startswith("#") else _value(part) for part in parts]
    return f"({' + '.join(terms)})"


def _allocation(text: str) -> str:
    number = re.match(r"#allocation(\d+)", text)
    if number is None:
        raise UnknownFormat(f"{text!r} is no allocation")
    # Spill slots share numbers with nothing else, but bear the suffix "_spill".
    return str(((int(number[1]) << 1) + text.endswith("_spill")) << 20)


def _words(array: np.ndarray) -> np.ndarray:
    """u32 words in the order of memory: rows padded to 128 lanes."""
    if array.ndim == 0:
        array = array.reshape(1)
    padded = -array.shape[-1] % LANES
    flat = array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
    return np.pad(flat, ((0, 0), (0, padded))).astype(np.int64).astype(np.uint32).reshape(-1)
