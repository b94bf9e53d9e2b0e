"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its stretched kinds, as Hugging Face configs name
them.

Frequencies are computed in float64 when a program is traced and enter it as constants; nothing of the size of the
longest context is stored.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.errors import InvalidConfig


def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines f32[T, H / 2] of `positions` i32[T], times the kind's attention factor."""
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim, config.max_position_embeddings)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the heads of `x` [T, N, H] by tables f32[T, H / 2], pairing the first half of H with the second
    (Hugging Face's order).

    Heads are outermost meanwhile, as the product that makes them has them in its tiles and as attention wants them on
    TPUs: else XLA turns 8 x 128 tiles of tokens into tiles of heads and back (of a layer of 8B with 2,048 tokens on a
    v6e 5.4 % of the bundles; libtpu 0.0.48, predicted). On a CPU it is the same loop, and as fast.
    """
    first, second = jnp.split(jnp.swapaxes(x, 0, 1).astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.swapaxes(rotated.astype(x.dtype), 0, 1)


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_position: int) -> tuple[np.ndarray, float]:
    """Radians a token f64[H / 2] of each pair, and the factor of cosine and sine.

    "dynamic" (NTK by length) equals "default" up to `max_position`, the length from which transformers stretches the
    base with the longest sequence it has seen. Paged keys are rotated once and for good, so longer contexts keep the
    unstretched base; limit max_model_len to `max_position` for these models.

    Raises InvalidConfig for an unknown kind.
    """
    base = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    original = rope.original_max_position or max_position
    match rope.kind:
        case "default" | "dynamic":
            return base, 1.0
        case "linear":
            return base / rope.factor, 1.0
        case "llama3":
            return llama3_frequencies(base, rope, original), 1.0
        case "yarn":
            return yarn_frequencies(base, rope, head_dim, original), yarn_attention_factor(rope)
    raise InvalidConfig("rope.kind", f"{rope.kind!r} is not one of default, linear, dynamic, yarn, llama3")


def llama3_frequencies(base: np.ndarray, rope: RopeConfig, original: int) -> np.ndarray:
    """Llama 3.1: long waves divided by the factor, short ones kept, a linear blend between.

    Source: github.com/meta-llama/llama-models, models/llama3/model.py, apply_scaling.
    """
    low = 1.0 if rope.low_freq_factor is None else rope.low_freq_factor
    high = 4.0 if rope.high_freq_factor is None else rope.high_freq_factor
    turns = original * base / (2 * math.pi)  # of each pair over the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * (kept + (1.0 - kept) / rope.factor)


def yarn_frequencies(base: np.ndarray, rope: RopeConfig, head_dim: int, original: int) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2): "NTK by parts", a ramp over the pair's index."""

    def pair_with(turns: float) -> float:
        """Index of the pair that makes so many turns over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast or 32.0), pair_with(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # as the paper's code: no division by zero
    stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return base * (1.0 - stretched) + base / rope.factor * stretched


def yarn_attention_factor(rope: RopeConfig) -> float:
    """Factor of cosine and sine; DeepSeek's `mscale` pair is their ratio."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
