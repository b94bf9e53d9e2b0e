"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x` [..., D] over its root mean square, times `weight` [D]; the mean is taken in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight
