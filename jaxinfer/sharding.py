"""The only table from logical axes to mesh axes, the mesh itself, and the sizes a model takes on a mesh."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidConfig

MESH_AXES = ("data", "tensor", "expert")
TENSOR = "tensor"

MESH_AXIS_OF: dict[str, str | None] = {
    "layers": None,  # a pipeline would put "stage" here
    "model": None,  # D: activations are whole on every device
    "head_dim": None,
    "heads": TENSOR,  # N * H, whole heads a shard
    "kv_heads": TENSOR,  # K * H, whole heads a shard
    "kv_scales": TENSOR,  # K
    "ffn": TENSOR,
    "vocab": TENSOR,
    "experts": "expert",
}
"""Logical axis of a parameter to mesh axis; None is replicated."""


@dataclass(frozen=True, slots=True)
class ShardedSizes:
    """Sizes that a mesh changes: num_kv_heads (each repeated kv_repeats times) and vocab_size (zero rows added)."""

    num_kv_heads: int
    kv_repeats: int
    vocab_size: int


def make_mesh(tensor_parallel_size: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of axes MESH_AXES over the first `tensor_parallel_size` devices.

    Raises InvalidConfig when there are not so many.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not 1 <= tensor_parallel_size <= len(devices):
        raise InvalidConfig(
            "tensor_parallel_size", f"must be 1 to {len(devices)} (the number of devices), got {tensor_parallel_size}"
        )
    return jax.make_mesh(
        (1, tensor_parallel_size, 1),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:tensor_parallel_size],
    )


def tensor_parallel_size(mesh: Mesh | None) -> int:
    """Shards of the tensor axis; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[TENSOR]


def sharded_sizes(config: ModelConfig, tensor_parallel: int) -> ShardedSizes:
    """What the model becomes on `tensor_parallel` shards.

    Fewer kv heads than shards are repeated (once, when loading), so that each shard holds whole heads; the vocabulary
    is padded with rows of zeros to a multiple of the shards, and the logits of those rows are cut off again.

    Raises InvalidConfig naming both numbers where query heads or the feed-forward width do not divide.
    """
    for name, size in (("query heads", config.num_heads), ("feed-forward width", config.intermediate_size)):
        if size % tensor_parallel:
            raise InvalidConfig(
                "tensor_parallel_size", f"{tensor_parallel} does not divide the model's {size} {name}; choose a divisor"
            )
    # Divides the query heads, since both K and the shards do.
    num_kv_heads = math.lcm(config.num_kv_heads, tensor_parallel)
    vocab_size = -(-config.vocab_size // tensor_parallel) * tensor_parallel
    return ShardedSizes(num_kv_heads, num_kv_heads // config.num_kv_heads, vocab_size)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else MESH_AXIS_OF[axis] for axis in axes))


def sharding(mesh: Mesh | None, spec: PartitionSpec) -> Sharding:
    """Sharding by `spec` on the mesh; without one, the first device."""
    return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec)


def replicated(mesh: Mesh | None) -> Sharding:
    """Whole on every device of the mesh; on the first device without one."""
    return sharding(mesh, PartitionSpec())
