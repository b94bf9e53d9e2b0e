"""All block sizes of the kernel that ships in jax: `python -m benchmarks.tpu_static.sweep v6e:1 [decode|int8|prefill]`.

Prints a line a block size as it comes: bundles a token of context (decode), or thousands of bundles (prefill). The best
few are what bench_tpu_static compiles again (blocks.py); the table is in benchmarks/README.md.
"""

import subprocess
import sys
from typing import Any

from benchmarks.tpu_static import measure

TOKENS = (256, 512, 1024, 2048)
# The largest blocks that compile take about a minute on an idle core.
SECONDS = 600
DECODE = [{"rows": 32, "q_len": 1, "context": 8192, "page_size": page} for page in (128, 16)]
INT8 = [{**shape, "kv_dtype": "int8"} for shape in DECODE]
PREFILL = [{"rows": 1, "q_len": 8192, "context": 8192, "page_size": page} for page in (128, 16)]
QUERIES = {"decode": (1, 2, 4, 8), "int8": (1, 2, 4), "prefill": (32, 64, 128, 256)}
SHAPES = {"decode": DECODE, "int8": INT8, "prefill": PREFILL}


def programs(what: str) -> list[dict[str, Any]]:
    """Block sizes that fit into a row, smallest blocks first."""
    return [
        {"kind": "jax", **shape, "pages": tokens // shape["page_size"], "queries": queries}
        for tokens in TOKENS for queries in QUERIES[what] for shape in SHAPES[what]
        if shape["page_size"] <= tokens <= shape["context"]
    ]  # fmt: skip


def main(target_name: str, what: str = "decode") -> int:
    for program in programs(what):
        tokens = program["pages"] * program["page_size"]
        print(f"{target_name} {what}, pages of {program['page_size']}, {tokens} x {program['queries']}:",
              bundles(target_name, program), flush=True)  # fmt: skip
    return 0


def bundles(target_name: str, program: dict[str, Any]) -> str:
    try:
        (found,) = measure.counts(target_name, [program], SECONDS)
    except subprocess.TimeoutExpired:
        return f"not compiled in {SECONDS} s"
    if isinstance(found, str):
        return found
    if program["q_len"] > 1:
        return f"{found.bundles / 1000:,.0f} thousand bundles"
    return f"{found.bundles / (program['rows'] * program['context']):.2f} bundles a token"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
