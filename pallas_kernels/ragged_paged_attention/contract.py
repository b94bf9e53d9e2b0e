"""What every implementation of ragged paged attention provides, and the description of a call it is chosen by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Device, current_device, no_reasons

type Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class AttentionSpec:
    """The static facts of a call: what an implementation may refuse.

    Fields:
      num_q_heads, num_kv_heads, head_dim: N, K and H of one shard (inside `shard_map`: the local sizes).
      page_size: C, tokens a page.
      dtype: of queries, new keys and new values; kv_dtype: of the pages.
      max_q_len: most queries of a row, where the caller knows it; 1 is the decode form.
      soft_cap, sinks, scales: whether the call has them.
      kv_pages_shape: where the pages exist already; an implementation refuses another's layout.
      device: what the call is compiled for.
      interpret: run by Pallas' interpreter, on any device.
      traced: inside a compiled program.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: Any = jnp.bfloat16
    kv_dtype: Any = jnp.bfloat16
    max_q_len: int | None = None
    soft_cap: bool = False
    sinks: bool = False
    scales: bool = False
    kv_pages_shape: tuple[int, ...] | None = None
    device: Device = field(default_factory=current_device)
    interpret: bool = False
    traced: bool = False


@dataclass(frozen=True)
class Options:
    """What changes scores and outputs. Static: scale and soft_cap. Traced: sinks f32[N], window i32[] (0 is none),
    k_scale and v_scale f32[] or f32[K]; None where the call has none.
    """

    scale: float
    soft_cap: float | None
    sinks: jax.Array | None
    window: jax.Array | None
    k_scale: jax.Array | None
    v_scale: jax.Array | None

    @staticmethod
    def make(
        scale: float,
        soft_cap: float | None,
        sinks: Array | None,
        window: Array | int | None,
        k_scale: Array | None,
        v_scale: Array | None,
    ) -> "Options":
        sinks, k_scale, v_scale = (
            None if x is None else jnp.asarray(x, jnp.float32) for x in (sinks, k_scale, v_scale)
        )
        window = None if window is None else jnp.asarray(window, jnp.int32).reshape(())
        return Options(scale, soft_cap, sinks, window, k_scale, v_scale)


@dataclass(frozen=True)
class AttentionImplementation:
    """One implementation: a record of functions with the signatures documented in `api`."""

    name: str
    automatic: bool
    unsupported_reasons: Callable[[AttentionSpec], list[str]]
    attend: Callable[..., tuple[Array, Array]]
    make_schedule: Callable[..., Any]
    kv_pages_shape: Callable[..., tuple[int, ...]]
    kv_head_axis: int
    page_size_axis: int
    pages_to_dense: Callable[..., tuple[Array, Array]]
    dense_to_pages: Callable[..., Array]
    yielding_reasons: Callable[[AttentionSpec], list[str]] = no_reasons


def common_reasons(spec: AttentionSpec) -> list[str]:
    """Reasons that hold for every implementation: sizes that mean nothing."""
    reasons = []
    if min(spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.page_size) < 1:
        reasons.append("num_q_heads, num_kv_heads, head_dim and page_size must be at least 1")
    elif spec.num_q_heads % spec.num_kv_heads:
        reasons.append(f"num_q_heads {spec.num_q_heads} is not a multiple of num_kv_heads {spec.num_kv_heads}")
    if jnp.dtype(spec.kv_dtype) == jnp.int8 and not spec.scales:
        reasons.append("int8 pages need k_scale and v_scale")
    if spec.max_q_len is not None and spec.max_q_len < 1:
        reasons.append(f"max_q_len {spec.max_q_len} is below 1")
    return reasons
