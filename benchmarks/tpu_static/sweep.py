"""All block sizes of the kernel that ships in jax: `python -m benchmarks.tpu_static.sweep v6e:1 [decode|int8|prefill]`.

Prints a line a block size as it comes. The best few are what bench_tpu_static compiles again (blocks.py); the table is
in benchmarks/README.md.
"""

import sys
from typing import Any

from benchmarks.tpu_static import measure

TOKENS = (256, 512, 1024, 2048)
DECODE = [{"rows": 32, "q_len": 1, "context": 8192, "page_size": page} for page in (128, 16)]
INT8 = [{**shape, "kv_dtype": "int8"} for shape in DECODE]
PREFILL = [{"rows": 1, "q_len": 8192, "context": 8192, "page_size": page} for page in (128, 16)]
QUERIES = {"decode": (1, 2, 4, 8), "int8": (1, 2, 4), "prefill": (32, 64, 128)}
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
        (found,) = measure.counts(target_name, [program])
        print(program, found, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
