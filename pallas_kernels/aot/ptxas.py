"""ptxas' report on the kernels of a GPU program, as `MOSAIC_GPU_DUMP_PTXAS=1` prints it (`toolchain.SETTINGS`)."""

import re
from dataclasses import dataclass

ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<architecture>[^']+)'")
FRAME = re.compile(r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One kernel as assembled; sizes in bytes.

    static_shared_memory does not hold what a kernel is given at launch, which is nearly all a Mosaic GPU kernel uses:
    that it fits is checked when the kernel is lowered. registers: where a kernel sets its own maximum, that one.
    """

    name: str
    architecture: str
    registers: int
    stack_frame: int
    spill_stores: int
    spill_loads: int
    static_shared_memory: int


def read(log: str) -> tuple[Kernel, ...]:
    """The kernels in what a process printed, in order; one that was assembled twice is there twice.

    Raises ValueError when a kernel's report is not complete.
    """
    parts = re.split(r"(?=Compiling entry function)", log)
    return tuple(_kernel(part) for part in parts if part.startswith("Compiling entry function"))


def _kernel(text: str) -> Kernel:
    entry, frame, used, shared = (pattern.search(text) for pattern in (ENTRY, FRAME, USED, SHARED))
    if entry is None or frame is None or used is None:
        raise ValueError(f"ptxas' report is not complete: {text[:400]!r}")
    return Kernel(
        name=entry["name"], architecture=entry["architecture"], registers=int(used["registers"]),
        stack_frame=int(frame["frame"]), spill_stores=int(frame["stores"]), spill_loads=int(frame["loads"]),
        static_shared_memory=int(shared["bytes"]) if shared else 0,
    )  # fmt: skip
