"""Whole steps compiled for TPUs and Hopper on a CPU, checked, as a table: `python -m benchmarks.aot [NAME ...]`.

A name is that of a case ("8b-bf16-v6e:1") or a part of it ("v5e", "8b-"). `--largest` compiles only the largest program
of each kind. Fails when a check does.
"""

import sys
import time
from typing import Any

from benchmarks.aot.cases import CASES, Case
from benchmarks.aot.checks import complaints, table
from pallas_kernels.aot import toolchain
from pallas_kernels.aot.targets import target

JOB = "benchmarks.aot.steps:compile_case"
JOB_SECONDS = 1800


def main(names: list[str]) -> int:
    """0 when every selected case passes its checks, 2 when nothing is selected."""
    every = "--largest" not in names
    names = [name for name in names if name != "--largest"]
    chosen = [case for case in CASES if not names or any(name in case.name for name in names)]
    if not chosen:
        print(f"no case has any of {', '.join(names)} in its name; there are {', '.join(c.name for c in CASES)}",
              file=sys.stderr)  # fmt: skip
        return 2
    found: list[tuple[Case, dict[str, Any]]] = []
    for case in chosen:
        began = time.perf_counter()
        found.append((case, run(case, every)))
        print(f"{case.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(found))
    wrong = [f"{case.name}: {complaint}" for case, result in found for complaint in complaints(case, result)]
    print("\n".join(wrong) or "every check passed")
    return int(bool(wrong))


def run(case: Case, every: bool) -> dict[str, Any]:
    """What the job of a case returns, or the failure that ended it."""
    try:
        platform = target(case.target).platform
        return toolchain.run(JOB, case.arguments() | {"every": every}, platform, seconds=JOB_SECONDS).value
    except toolchain.JobFailed as failure:
        return {"failure": f"{failure.kind}: {failure.message}"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
