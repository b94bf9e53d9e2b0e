"""Scores on Hopper, in units of log2: what products are multiplied by, and the soft cap."""

import math

import jax.numpy as jnp
from jax import Array

LOG2_E = math.log2(math.e)


def score_factor(scale: float, soft_cap: float | None) -> float:
    """What a product is multiplied by for exp2: of the softmax, or with a soft cap that of its tanh."""
    return scale * LOG2_E * (1 if soft_cap is None else 2 / soft_cap)


def capped(scores: Array, soft_cap: float) -> Array:
    """`soft_cap` * tanh of products that `score_factor` has been multiplied to, in units of log2.

    tanh(x) = 1 - 2 / (1 + exp(2 x)): the card's approximate tanh is off by 2^-11 (PTX ISA, tanh.approx), that is 2.4 %
    of a probability at a cap of 50; exp2 by 2^-22.
    """
    return (1 - 2 / (1 + jnp.exp2(scores))) * (soft_cap * LOG2_E)
