"""What must hold of a case's compiled programs, and the table that shows it."""

from collections.abc import Sequence
from typing import Any

from benchmarks.aot.cases import Case
from benchmarks.aot.models import MODELS
from pallas_kernels.aot.targets import target

BYTES_FLOOR, BYTES_GOAL = 1.10, 1.02
"""HBM bytes of a decode step over the least there can be."""
SECONDS_FLOOR, SECONDS_GOAL = 120, 30
"""To compile all programs of one model and target on two cores."""
COLUMNS = ("case", "layers", "attention", "pages", "programs", "compile s", "weights", "temporaries", "pages aliased",
           "copies", "HBM/ideal", "collectives a layer")  # fmt: skip


def complaints(case: Case, result: dict[str, Any]) -> list[str]:
    """Everything that is not as it must be, in words."""
    if "failure" in result:
        return [f"did not compile: {result['failure']}"]
    if "error" in result:
        return [f"does not fit: {result['error']}"] if case.fits else []
    if not case.fits:
        return ["fits, where a memory error was expected"]
    wrong = []
    for program in result["programs"]:
        wrong += [f"{program['name']}: {found}" for found in program_complaints(program, result)]
    ratio, per_layer = bytes_ratio(result), collectives_a_layer(case, result)
    if ratio is not None and ratio > BYTES_FLOOR:
        wrong.append(f"a decode step moves {ratio:.3f} times the least bytes, over {BYTES_FLOOR}")
    if per_layer != (2 if target(case.target).num_devices > 1 else 0):
        wrong.append(f"{per_layer} collectives a layer")
    if compile_seconds(result) > SECONDS_FLOOR:
        wrong.append(f"compiled in {compile_seconds(result):.0f} s, over {SECONDS_FLOOR} s")
    return wrong


def compile_seconds(result: dict[str, Any]) -> float:
    """On two cores that do nothing else: the time that passed, or where that is less (other work was beside it) half
    the processors' time, and at least that of tracing, which is one thread's.
    """
    return min(result["seconds"], max(result["cpu_seconds"] / 2, result["tracing_seconds"]))


def program_complaints(program: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Donated pages not in place, copies of weights or pages, temporaries where there should be none."""
    wrong = []
    pages = result["plan"]["num_pages"] * result["plan"]["bytes_per_page"]
    if program["donates"] and program["aliased"] < pages:
        wrong.append(f"{program['aliased']:,} B lie in donated arguments, the pages have {pages:,} B")
    if program["copies"]:
        wrong.append(f"copies whole weights or pages: {', '.join(program['copies'][:5])}")
    if program["temporaries"] > program["allowed"]:
        wrong.append(f"temporaries of {program['temporaries']:,} B, over {program['allowed']:,} B")
    return wrong


def bytes_ratio(result: dict[str, Any]) -> float | None:
    """None where the attention's bytes follow the rows at run time (XLA's loops)."""
    decode = result["decode"]
    return None if decode["bytes"] is None else decode["bytes"] / decode["ideal"]


def collectives_a_layer(case: Case, result: dict[str, Any]) -> float:
    """Of a decode step; the embedding's sum and the head's gather belong to no layer."""
    every = sum(result["decode"]["collectives"].values())
    return (every - 2) / MODELS[case.model].num_layers if target(case.target).num_devices > 1 else float(every)


def table(found: Sequence[tuple[Case, dict[str, Any]]]) -> str:
    """Markdown; bytes are of one device."""
    rows = [COLUMNS, tuple("-" * len(name) for name in COLUMNS)]
    rows += [row(case, result) for case, result in found]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(case: Case, result: dict[str, Any]) -> tuple[str, ...]:
    if "plan" not in result:
        reason = result.get("failure") or "memory error: weights of {}, budget {}".format(
            gigabytes(result["weights"]), gigabytes(result["budget"])
        )
        return (case.name, reason.splitlines()[0].replace("|", "/"), *[""] * (len(COLUMNS) - 2))
    programs, ratio = result["programs"], bytes_ratio(result)
    return (
        case.name,
        result["layer_loop"],
        result["attention"],
        f"{result['plan']['num_pages']:,}",
        str(len(programs)),
        f"{compile_seconds(result):.0f}",
        gigabytes(result["plan"]["weights"]),
        gigabytes(max(program["temporaries"] for program in programs)),
        gigabytes(min(program["aliased"] for program in programs if program["donates"])),
        str(sum(len(program["copies"]) for program in programs)),
        "-" if ratio is None else f"{ratio:.3f}",
        f"{collectives_a_layer(case, result):g}",
    )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB"
