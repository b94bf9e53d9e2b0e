"""What the card's memory gives a reader: the ceiling that shares of bandwidth refer to."""

import jax
import jax.numpy as jnp

from benchmarks.h200.contenders import of_jax, warm

PROBE_BYTES = 4 * 2**30
"""Seventy times the L2, which holds 60 MB."""


def read_bandwidth(rounds: int) -> float:
    """Bytes a second of a sum over PROBE_BYTES of int32 (the best of the rounds: a ceiling is what was reached)."""
    data = jnp.zeros(PROBE_BYTES // 4, jnp.int32)
    total = jax.jit(lambda carry, data: carry + jnp.sum(data))
    reader = of_jax("sum", lambda carry: total(carry, data), jnp.int32(0))
    launches = warm(reader)
    return PROBE_BYTES / min(reader.turn(launches) for _ in range(rounds))
