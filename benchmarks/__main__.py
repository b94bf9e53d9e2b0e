"""Every bench after each other: `python -m benchmarks [NAME ...]`.

Fails when a bench fails or a number is under its floor.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Result, table

FOLDER = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """Run the benches of these names (without `bench_`), or all of them."""
    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no bench named {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    results: list[Result] = []
    failed: list[str] = []
    for name in names or known:
        print(f"\n=== bench_{name}", flush=True)
        code, found = run(name)
        results += found
        failed += [name] if code or not found else []
    print(f"\n=== all\n{table(results)}")
    if failed:
        print(f"failed or under a floor: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str) -> tuple[int, list[Result]]:
    """Run one bench in a process of its own, showing what it prints; its exit code and the results of its last line."""
    last = ""
    command = [sys.executable, "-m", f"benchmarks.bench_{name}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent) as process:
        assert process.stdout is not None  # noqa: S101 (we asked for a pipe)
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    results = read(last)
    missed = any(not result.reaches(result.floor) for result in results)
    return process.returncode or int(missed), results


def read(line: str) -> list[Result]:
    """The results in a bench's last line; none when it is not the JSON object it should be."""
    try:
        found = json.loads(line)
        return [Result(**{**result, "name": f"{found['bench']}: {result['name']}"}) for result in found["results"]]
    except (ValueError, TypeError, KeyError):
        return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
