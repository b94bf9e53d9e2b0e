"""What does serving cost, and is it even and back soon?

Three questions about the real server in a process of its own: CPU a streamed token over that of a bare grpc.aio server
that sends the same messages (`serving.cpu`); the gaps between tokens at 80 % load over the longest step
(`serving.gaps`); the time from a full queue to recovery (`serving.recovery`).
"""

import argparse
import sys

from benchmarks.report import exit_code, report
from benchmarks.serving import cpu, gaps, recovery

ROUNDS = 7
PARTS = ("cpu", "gaps", "flood")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="some of them only")
    options = parser.parse_args()
    found = []
    if "cpu" in options.parts:
        found += cpu.measured(1 if options.quick else ROUNDS, cpu.cases(quick=options.quick))
    if "gaps" in options.parts:
        found += gaps.measured(gaps.QUICK if options.quick else gaps.Length())
    if "flood" in options.parts:
        found += recovery.measured(recovery.QUICK if options.quick else recovery.Length())
    report("serve", found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
