"""Compiling programs in a job and saying what the compiler made of them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pallas_kernels.aot import ptxas, toolchain, tpu_schedule
from pallas_kernels.aot.memory import Copy, Memory, copies
from pallas_kernels.aot.programs import OPERATIONS
from pallas_kernels.aot.targets import target

JOB = "pallas_kernels.aot.measure:compile_programs"
BEGINS = "--- next program ---"
"""Printed before each program is compiled, so that what the compilers print is known to be of it."""


@dataclass(frozen=True)
class LoopFigures:
    """The hot loop of a TPU kernel. spilling: share of its bundles that store a spilled register."""

    kernel: str
    bundles: int
    loop_depth: int
    loop_bundles: int
    loop_spilling: float
    loop_fills: int
    loop_matrix_fill: float


@dataclass(frozen=True)
class Measured:
    """One program: what it was, or why it did not compile. copies: of at least `min_copy_bytes`."""

    arguments: dict[str, Any]
    error: str | None = None
    memory: Memory | None = None
    copies: tuple[Copy, ...] = ()
    loops: tuple[LoopFigures, ...] = ()
    kernels: tuple[ptxas.Kernel, ...] = ()


def measure(
    operation: str, programs: list[dict[str, Any]], target_name: str, *, min_copy_bytes: int = 1 << 20
) -> list[Measured]:
    """Compiles `programs` (arguments of `programs.OPERATIONS[operation]`) for a target in one process.

    A program that does not compile has an `error`. A kernel that several GPU programs share is assembled once, and
    reported of the first.

    Raises as `toolchain.run`.
    """
    where = target(target_name)
    arguments = {
        "target_name": target_name,
        "operation": operation,
        "programs": programs,
        "min_copy_bytes": min_copy_bytes,
    }
    finished = toolchain.run(JOB, arguments, where.platform, dump=where.platform == "tpu")
    logs = finished.log.split(BEGINS)[1:]  # ptxas' reports of each program
    return [_measured(each, ptxas.read(log) if where.platform == "cuda" else ())
            for each, log in zip(finished.value, logs, strict=True)]  # fmt: skip


def compile_programs(
    target_name: str,
    operation: str,
    programs: list[dict[str, Any]],
    min_copy_bytes: int,
    dump_folder: str | None = None,
) -> list[dict[str, Any]]:
    """The job: one dictionary a program, JSON all through."""
    where = target(target_name)
    mesh = where.mesh()
    return [_compile(operation, arguments, mesh, where.name.partition(":")[0], min_copy_bytes, dump_folder)
            for arguments in programs]  # fmt: skip


def _compile(operation, arguments, mesh, chip: str, min_copy_bytes: int, dump_folder: str | None) -> dict[str, Any]:
    import jax

    print(BEGINS, flush=True)
    try:
        with jax.set_mesh(mesh):
            program = OPERATIONS[operation](**arguments)
        compiled = program.compile(mesh)
    except Exception as error:  # the compiler's refusal is a result
        _take_dumps(dump_folder)
        return {"arguments": arguments, "error": f"{type(error).__name__}: {error}"}
    schedules = tpu_schedule.collect(dump_folder, chip) if dump_folder else []
    _take_dumps(dump_folder)
    return {
        "arguments": arguments,
        "memory": asdict(Memory.of(compiled)),
        "copies": [asdict(copy) for copy in copies(compiled.as_text() or "", min_copy_bytes)],
        "loops": [asdict(figures(schedule)) for schedule in schedules],
    }


def figures(schedule: tpu_schedule.Schedule) -> LoopFigures:
    """What the table shows of a schedule."""
    loop = schedule.hot_loop
    return LoopFigures(
        schedule.kernel, schedule.root.all_bundles, schedule.root.depth, loop.all_bundles, schedule.spilling(loop),
        loop.total(tpu_schedule.FILL), schedule.fill(tpu_schedule.MATRIX, loop),
    )  # fmt: skip


def _take_dumps(folder: str | None) -> None:
    """What lies in the folder belongs to one program; the next begins with an empty one."""
    for path in Path(folder).iterdir() if folder else ():
        path.unlink()


def _measured(found: dict[str, Any], kernels: tuple[ptxas.Kernel, ...]) -> Measured:
    if found.get("error"):
        return Measured(found["arguments"], error=found["error"])
    return Measured(
        found["arguments"],
        memory=Memory(**found["memory"]),
        copies=tuple(Copy(**each) for each in found["copies"]),
        loops=tuple(LoopFigures(**each) for each in found["loops"]),
        kernels=kernels,
    )
