"""Run by test_compile_cache.py as a process to be killed: fills a compile cache without jax, slowly and for long.

Usage: compile_cache_filler.py FOLDER SEED NUM_ENTRIES
"""

import contextlib
import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxinfer import compile_cache


def main(folder: str, seed: int, num_entries: int) -> None:
    compile_cache._jax_uses = lambda staging: contextlib.nullcontext()
    numbers = random.Random(seed)
    with compile_cache.open_cache(folder) as cache:
        print("filling", flush=True)
        for number in range(num_entries):
            content = zlib.compress(numbers.randbytes(numbers.randrange(1, 200_000)))
            path = cache._staging / f"jit_step_{number}-cache"
            if path.exists():  # JAX does not write then
                continue
            with path.open("wb") as file:
                for start in range(0, len(content), 20_000):
                    file.write(content[start : start + 20_000])
                    file.flush()
            cache.publish()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
