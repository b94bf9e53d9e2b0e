"""What pages may hold, and how keys and values get there.

int8 and fp8 pages hold `x / scale`; a kv head has one scale for its keys and one for its values, both traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention.contract import Array

SCALED = ("int8", "float8_e4m3fn")
# -128 is left out so that the range is symmetric; 448 is the largest finite e4m3fn (OCP 8-bit floating point, table 2).
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def is_scaled(dtype: Any) -> bool:
    return jnp.dtype(dtype).name in SCALED


def to_page_dtype[A: (jax.Array, np.ndarray)](new: A, scale: Array | None, dtype: Any) -> A:
    """New keys or values [T, K, H] as the pages hold them; scale f32[] or f32[K], None for pages that have none.

    Rounds to nearest even, out-of-range values saturate, NaN becomes 0 in int8.
    """
    xp: Any = np if isinstance(new, np.ndarray) else jnp
    name = jnp.dtype(dtype).name
    if name not in SCALED:
        return new.astype(dtype)
    by_head = xp.broadcast_to(xp.asarray(1.0 if scale is None else scale, "float32"), new.shape[1:2])[:, None]
    scaled = xp.clip(new.astype("float32") / by_head, -LARGEST[name], LARGEST[name])
    if name == "int8":
        scaled = xp.where(scaled == scaled, xp.rint(scaled), 0)
    return scaled.astype(dtype)
