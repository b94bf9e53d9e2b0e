"""Weights of layers into one stack, where it lies, one layer after the other."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import sharding


def stacked(weights: Iterable[jax.Array], wanted: Any, mesh: Mesh | None, convert: Callable[[jax.Array], Any]) -> Any:
    """A stack of all layers' weights, made on its shards.

    Each of `weights` is dropped before the next one is asked for, so that beside the stack no more than one layer's
    weight is ever in memory.

    Args:
      weights: one for each entry of the stack.
      wanted: a pytree of ParamSpecs with the leading axis L.
      convert: from a weight to one entry of the stack, a pytree like `wanted`; runs on the device.
    """
    places = jax.tree.map(
        lambda spec: sharding.sharding(mesh, sharding.partition_spec(spec.axes)), wanted, is_leaf=has_axes
    )
    stack = jax.tree.map(
        lambda spec, place: jnp.zeros(spec.shape, spec.dtype, device=place), wanted, places, is_leaf=has_axes
    )

    def write(stack: Any, weight: jax.Array, index: jax.Array) -> Any:
        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), index, 0)

        return jax.tree.map(put, stack, convert(weight))

    donating = jax.jit(write, donate_argnums=0, out_shardings=places)
    index = 0
    for weight in weights:  # not by `enumerate`, which would keep the last weight alive
        stack = donating(stack, weight, jnp.int32(index))
        jax.block_until_ready(stack)  # else the host runs ahead and has many layers' weights on the device at once
        del weight
        index += 1  # noqa: SIM113
    return stack


def has_axes(node: Any) -> bool:
    """Whether a node of `wanted` is a ParamSpec."""
    return hasattr(node, "axes")
