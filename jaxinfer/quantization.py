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
from jaxinfer.linear import QuantizedWeight
from pallas_kernels.int8_matmul import quantize_weight

WEIGHT_FORMATS: dict[str | None, str | None] = {None: None, "int8": "int8_dynamic", "int8_weight_only": "int8"}
"""`quantization` to `QuantizedWeight.format`."""


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
    stack = jax.tree.map(lambda spec, place: jnp.zeros(spec.shape, spec.dtype, device=place), wanted, places)
    write = jax.jit(write_layer, donate_argnums=0, out_shardings=places)
    index = 0
    for weight in weights:  # not by `enumerate`, which would keep the last weight alive
        stack = write(stack, weight, jnp.int32(index))
        jax.block_until_ready(stack)  # else the host runs ahead and has many layers' weights on the device at once
        del weight
        index += 1  # noqa: SIM113
    return stack


def write_layer(stack: QuantizedWeight, weight: jax.Array, index: jax.Array) -> QuantizedWeight:
    """`stack` with layer `index` from the float weight [F, D]; donate it."""
    values, scale = map(jnp.asarray, quantize_weight(weight))
    update = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
    return replace(stack, values=update(stack.values, values), scale=update(stack.scale, scale))


def spec_of(wanted: QuantizedWeight) -> Any:
    """The ParamSpec of the values."""
    return wanted.values
