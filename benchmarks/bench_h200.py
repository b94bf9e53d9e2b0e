"""The kernels on an NVIDIA H200 (or H100): correctness first, then speed beside torch and cuDNN in the same process.

Without one of these cards it says so, every value is null, and it exits with 0. Shares refer to what a plain read
reaches; ratios are medians over rounds in which the contenders take turns. A part that fails, faults or hangs is named,
the others are still measured, and the exit status is 1.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory on the same card

import jax

from benchmarks.h200 import isolation, marks, parts
from benchmarks.report import Result, exit_code, report
from pallas_kernels.devices import HOPPER

ROUNDS, QUICK_ROUNDS = 15, 2
SECONDS = 450
"""For all of it: below 8 minutes, with time to print."""
MOST_SECONDS = {"correctness": 170, "decode": 170, "prefill": 90, "int8": 90, "step": 130}
"""Of a part; what hangs ends then."""


def main() -> int:
    options = parser().parse_args()
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.part:
        if options.out is None:
            parser().error("--part needs --out")
        for results in parts.measured(options.part, rounds):
            isolation.write(options.out, results)
        return 0
    device = jax.devices()[0]
    if device.platform != "gpu" or not HOPPER.search(device.device_kind):
        print(f"skipped: this is {device.platform} {device.device_kind}, no NVIDIA H200 or H100; nothing was measured")
        report("h200", [mark.result(None) for mark in marks.marks()])
        return 0
    print(f"on {device.device_kind}, jax {jax.__version__}", flush=True)
    results = every_part(options.quick)
    report("h200", results)
    return exit_code(results)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--quick", action="store_true", help="a smoke run; its numbers mean nothing")
    found.add_argument("--part", choices=parts.NAMES, help="measure one part in this process; needs --out")
    found.add_argument("--out", type=Path, help="where a part's results go, a line each")
    return found


def every_part(quick: bool) -> list[Result]:
    """The results of all parts; those of correctness at once, then one after the other what is timed."""
    deadline = time.monotonic() + SECONDS

    def run(part: str) -> list[Result]:
        command = [sys.executable, "-m", "benchmarks.bench_h200", "--part", part, *(["--quick"] if quick else [])]
        seconds = min(MOST_SECONDS[part.split()[0]], deadline - time.monotonic())
        return isolation.run(command, part, seconds)

    checks = [part for part in parts.NAMES if part.startswith("correctness")]
    results = isolation.at_once([partial(run, part) for part in checks])
    for part in parts.LOADS:
        results += run(part)
    return results


if __name__ == "__main__":
    sys.exit(main())
