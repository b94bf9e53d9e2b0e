"""Weights as our own form stores them into those that a mesh and a layer loop want."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, Sharding

from jaxinfer import sharding
from jaxinfer.params import ParamSpec, fit


def evenly_cut(spec: ParamSpec, mesh: Mesh | None) -> Sharding:
    """The sharding of a stored weight: as when it is used where the sizes divide, else whole."""
    shards = sharding.tensor_parallel_size(mesh)
    cut = sharding.partition_spec(spec.axes)
    if any(axis is not None and size % shards for axis, size in zip(cut, spec.shape, strict=True)):
        cut = PartitionSpec()
    return sharding.sharding(mesh, cut)


def assemble(parts: list[jax.Array], source: ParamSpec, target: ParamSpec, head_dim: int, place: Sharding) -> jax.Array:
    """One weight of the target from one stored weight, or from one a layer."""
    if parts[0].shape == target.shape:
        return jax.device_put(parts[0], place)
    shape = target.shape[-len(source.shape) :]

    def build(parts: list[jax.Array]) -> jax.Array:
        fits = [fit(part, source, head_dim, shape) for part in parts]
        return jnp.stack(fits) if len(target.shape) > len(shape) else fits[0]

    return jax.jit(build, out_shardings=place)(parts)
