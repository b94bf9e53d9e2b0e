"""What the card's memory gives a reader: the ceiling that shares of bandwidth refer to."""

import jax
import jax.numpy as jnp

from benchmarks.h200.contenders import of_jax, warm

PROBE_BYTES = 4 * 2**30
"""Seventy times the L2, which holds 60 MB."""


def read_bandwidth(rounds: int) -> float:
    """Bytes a second: the best of all rounds of a sum over PROBE_BYTES, and of a pass that reads and writes a half.

    The larger of the two, so that a slow reduction makes no share look better than it is.
    """
    data = jnp.zeros(PROBE_BYTES // 4, jnp.int32)
    total = jax.jit(lambda carry, data: carry + jnp.sum(data))
    reader = of_jax("sum", lambda carry: total(carry, data), jnp.int32(0))
    changed = jax.jit(lambda data: data + 1, donate_argnums=0)
    writer = of_jax("read and write", changed, jnp.zeros(PROBE_BYTES // 8, jnp.int32))
    found = []
    for probe in (reader, writer):
        launches = warm(probe)
        found += [PROBE_BYTES / probe.turn(launches) for _ in range(rounds)]
    return max(found)
