"""The pages array: its shape, its sharding, its bytes.

Letters: L layers, P pages, C tokens a page, K kv heads, H head width.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, Sharding

from jaxinfer import sharding
from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidConfig
from pallas_kernels import ragged_paged_attention as attention
from pallas_kernels.dispatch import Device, Unsupported, current_device, device_of
from pallas_kernels.ragged_paged_attention.api import named
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled


@dataclass(frozen=True, slots=True)
class KVCache:
    """What the pages of a group of layers look like; hashable, holds no arrays.

    num_kv_heads: of all shards together, repeated heads included. implementation: which attention owns the layout.
    """

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    implementation: str
    mesh: Mesh | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[L, P, ...]; along the kv head axis the shards' own layouts lie side by side."""
        shards = sharding.tensor_parallel_size(self.mesh)
        shape = list(
            attention.kv_pages_shape(
                self.num_layers, self.num_pages, self.page_size, self.num_kv_heads // shards, self.head_dim, self.dtype,
                implementation=self.implementation,
            )
        )  # fmt: skip
        shape[attention.kv_head_axis(self.implementation)] *= shards
        return tuple(shape)

    @property
    def partition_spec(self) -> PartitionSpec:
        return pages_partition_spec(self.implementation)

    @property
    def sharding(self) -> Sharding:
        return sharding.sharding(self.mesh, self.partition_spec)

    @property
    def bytes_per_page(self) -> int:
        """Of one page in all layers, all shards together."""
        return math.prod(self.shape) // self.num_pages * jnp.dtype(self.dtype).itemsize

    def struct(self) -> jax.ShapeDtypeStruct:
        """For compiling before the pages exist."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)

    def allocate(self) -> jax.Array:
        """Pages of zeros, made on their shards."""
        return jnp.zeros(self.shape, self.dtype, device=self.sharding)


def attention_spec(
    config: ModelConfig, *, page_size: int, dtype: Any, kv_dtype: Any = None, shards: int = 1,
    max_q_len: int | None = None, device: Device | None = None,
) -> attention.AttentionSpec:  # fmt: skip
    """The attention calls of a model on one of `shards`, as implementations are chosen by.

    device: what they are compiled for; None is where a call would run.

    Raises InvalidConfig when the model cannot be cut so.
    """
    kv_dtype = jnp.dtype(dtype if kv_dtype is None else kv_dtype)
    return attention.AttentionSpec(
        num_q_heads=config.num_heads // shards,
        num_kv_heads=sharding.sharded_sizes(config, shards).num_kv_heads // shards,
        head_dim=config.head_dim,
        page_size=page_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_q_len=max_q_len,
        scales=is_scaled(kv_dtype),
        device=device or current_device(),
        traced=True,
    )


def kv_cache(
    config: ModelConfig,
    *,
    num_pages: int,
    page_size: int,
    dtype: Any,
    kv_dtype: Any = None,
    mesh: Mesh | None = None,
    implementation: str | None = None,
) -> KVCache:
    """The pages of a model on a mesh; `implementation` None takes the first attention that can serve it.

    dtype: of activations. kv_dtype: of the pages; that of the activations when None.

    Raises InvalidConfig with every reason when none can, or when the model cannot be cut over the mesh.
    """
    shards = sharding.tensor_parallel_size(mesh)
    spec = attention_spec(
        config, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype, shards=shards, device=device_of(mesh)
    )
    try:
        implementation = attention.resolve(spec, implementation)
    except (Unsupported, ValueError) as error:
        raise InvalidConfig("attention", str(error)) from error
    return KVCache(
        config.num_layers,
        num_pages,
        page_size,
        spec.num_kv_heads * shards,
        config.head_dim,
        jnp.dtype(spec.kv_dtype),
        implementation,
        mesh,
    )


def pages_partition_spec(implementation: str) -> PartitionSpec:
    """Pages are cut along their kv heads, so that each shard attends to its own heads alone."""
    return PartitionSpec(*[None] * attention.kv_head_axis(implementation), sharding.TENSOR)


def page_size_of(kv_pages: jax.Array, implementation: str) -> int:
    """Tokens a page (C), read from the pages' own layout."""
    return kv_pages.shape[named(implementation).page_size_axis]
