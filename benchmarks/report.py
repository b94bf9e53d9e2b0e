"""What every bench prints: a table, and one JSON object as the last line. `exit_code` is what its `main` returns."""

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Result:
    """One measured number. value: None where it was not measured. floor: the worst acceptable value; goal: what we aim
    at; None where only shown.
    """

    name: str
    value: float | None
    unit: str
    floor: float | None = None
    goal: float | None = None
    better: Literal["higher", "lower"] = "lower"

    def reaches(self, mark: float | None) -> bool:
        """Whether the value is at least as good as `mark`, or one of them is missing; NaN never is."""
        if mark is None or self.value is None:
            return True
        return self.value >= mark if self.better == "higher" else self.value <= mark

    @property
    def verdict(self) -> str:
        if self.floor is None and self.goal is None:
            return ""
        if self.value is None:
            return "not measured"
        if not self.reaches(self.floor):
            return "UNDER THE FLOOR"
        return "goal met" if self.reaches(self.goal) else "floor met"


def report(bench: str, results: Sequence[Result]) -> None:
    """Prints the table and the JSON line."""
    print(table(results))
    print(json.dumps({"bench": bench, "results": [dataclasses.asdict(result) for result in results],
                      "machine": machine(), "date": datetime.date.today().isoformat()}), flush=True)


def exit_code(results: Sequence[Result]) -> int:
    """1 when a floor is missed, else 0."""
    return 0 if all(result.reaches(result.floor) for result in results) else 1


def table(results: Sequence[Result]) -> str:
    """The results in aligned columns."""
    rows = [("", "value", "unit", "goal", "floor", "")]
    rows += [(result.name, shown(result.value), result.unit, shown(result.goal), shown(result.floor), result.verdict)
             for result in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in rows)


def shown(value: float | None) -> str:
    """Four significant digits, large numbers whole."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> str:
    """CPU model and the cores this process may use."""
    return f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else (
        f"{_cpu_model()}, {os.cpu_count()} cores")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    # Names, units and verdicts read from the left, numbers from the right.
    return [cell.ljust(width) if column in (0, 2, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
