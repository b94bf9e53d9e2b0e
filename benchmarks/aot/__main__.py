"""Whole steps, and every kernel, compiled for TPUs and Hopper on a CPU, checked, as tables.

python -m benchmarks.aot [--largest] [NAME ...]

A name is a part of that of a case ("8b-bf16-v6e:1", "v5e", "8b-int8") or of a group of kernels ("kernels-8b-v6e:1",
"kernels-tuned"). `--largest` compiles of each case only the largest program of each kind. Fails when a check does.
"""

import sys
import time

from benchmarks.aot import checks, jobs, kernel_checks
from benchmarks.aot.cases import CASES
from pallas_kernels.chips import CHIPS


def main(names: list[str]) -> int:
    """0 when all that is selected passes its checks, 2 when nothing is selected."""
    every = "--largest" not in names
    names = [name for name in names if name != "--largest"]

    def wanted(name: str) -> bool:
        return not names or any(part in name for part in names)

    steps = jobs.step_jobs([case for case in CASES if wanted(case.name)], every)
    kernels = [job for chip in CHIPS for job in jobs.kernel_jobs(chip, wanted)]
    if not steps + kernels:
        print(f"nothing has any of {', '.join(names)} in its name; there are {', '.join(c.name for c in CASES)} and "
              "kernels-{8b,70b,widths,tuned-FILE}-TARGET", file=sys.stderr)  # fmt: skip
        return 2
    began = time.perf_counter()
    chosen = steps + kernels
    results = jobs.run(chosen)
    compiled, calls = results[: len(steps)], [call for some in results[len(steps) :] for call in some]
    if compiled:
        print(checks.table(compiled))
    if calls:
        print(kernel_checks.table(calls))
    wrong = [complaint for job, result in zip(chosen, results, strict=True) for complaint in job.complaints(result)]
    print("\n".join(wrong) or "every check passed")
    print(f"{len(wrong)} complaints, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
