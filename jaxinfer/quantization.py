"""int8 weights: what `quantization` asks for, and how a float weight becomes values and scales where it lies.

"int8" quantises the weights once and the activations of every token as it comes; "int8_weight_only" leaves the
activations alone. Both store the same: the projections of the layers as int8 with a float32 scale an output feature.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import sharding
from jaxinfer.errors import InvalidConfig
from jaxinfer.linear import QuantizedWeight
from jaxinfer.stacking import stacked
from pallas_kernels.int8_matmul import quantize_weight

WEIGHT_FORMATS: dict[str | None, str | None] = {None: None, "int8": "int8_dynamic", "int8_weight_only": "int8"}
"""`quantization` to `QuantizedWeight.format`."""


def check_quantization(name: str | None) -> None:
    """Raises InvalidConfig for a name that means nothing."""
    if name not in WEIGHT_FORMATS:
        raise InvalidConfig("quantization", f"{name!r} is not one of int8, int8_weight_only")


def quantized(weights: Iterable[jax.Array], wanted: QuantizedWeight, mesh: Mesh | None) -> QuantizedWeight:
    """One weight, or a stack of all layers' weights, made on its shards.

    Each of `weights` is dropped before the next one is asked for, so that beside the int8 values no more than one
    layer's weight is ever in memory.

    Args:
      weights: float [F, D], one for each entry of the stack, or exactly one; each placed like the values.
      wanted: a QuantizedWeight of ParamSpecs (`params.quantized_spec`).
    """
    places = jax.tree.map(lambda spec: sharding.sharding(mesh, sharding.partition_spec(spec.axes)), wanted)
    parts = (places.values, places.scale)
    if len(spec_of(wanted).shape) == 2:
        (weight,) = weights
        values, scale = jax.jit(quantize_weight, out_shardings=parts)(weight)
        return replace(wanted, values=values, scale=scale)
    return stacked(weights, wanted, mesh, partial(as_quantized, wanted))


def as_quantized(wanted: QuantizedWeight, weight: jax.Array) -> QuantizedWeight:
    """`wanted` with the values and scale of a float weight [F, D]."""
    values, scale = map(jnp.asarray, quantize_weight(weight))
    return replace(wanted, values=values, scale=scale)


def spec_of(wanted: QuantizedWeight) -> Any:
    """The ParamSpec of the values."""
    return wanted.values
