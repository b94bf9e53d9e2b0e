"""Ragged paged attention on Hopper GPUs in Mosaic GPU (sm_90a): the record, and the kernels of a call in order.

Rows with few queries go to `gpu_decode`, all others to `gpu_prefill`. Pages are `[L, P, 2, K, C, H]`, as in `xla`; new
keys and values are written in place by the kernels themselves.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from pallas_kernels.devices import hopper_reasons
from pallas_kernels.ragged_paged_attention import (
    gpu_blocks,
    gpu_decode,
    gpu_prefill,
    gpu_prefill_schedule,
    gpu_schedule,
    xla,
)
from pallas_kernels.ragged_paged_attention.contract import (
    AttentionImplementation,
    AttentionSpec,
    Options,
    common_reasons,
)
from pallas_kernels.ragged_paged_attention.page_dtypes import SCALED, to_page_dtype

HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
PAGE_DTYPES = ("bfloat16", *SCALED)


@register_dataclass
@dataclass(frozen=True)
class Schedule:
    """Work of a step.

    Fields:
      few: of the decode kernel; None where not one query of a group fits its columns.
      many: of the prefill kernel, which takes the rows that are left; None where `max_q_len` leaves none.
    """

    few: gpu_schedule.DecodeSchedule | None
    many: gpu_prefill_schedule.PrefillSchedule | None


def unsupported_reasons(spec: AttentionSpec) -> list[str]:
    reasons = common_reasons(spec) + hopper_reasons(spec.device, spec.interpret)
    if jnp.dtype(spec.dtype) != jnp.bfloat16:
        reasons.append(f"dtype {jnp.dtype(spec.dtype).name} is not bfloat16 (float32 would be rounded to it by wgmma)")
    if jnp.dtype(spec.kv_dtype).name not in PAGE_DTYPES:
        reasons.append(f"kv_dtype {jnp.dtype(spec.kv_dtype).name} is not one of {', '.join(PAGE_DTYPES)}")
    if spec.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {spec.head_dim} is not one of {HEAD_DIMS}")
    if spec.page_size not in PAGE_SIZES:
        reasons.append(f"page_size {spec.page_size} is not one of {PAGE_SIZES}")
    shape = spec.kv_pages_shape
    if shape is not None and (len(shape) != 6 or shape[2:] != (2, spec.num_kv_heads, spec.page_size, spec.head_dim)):
        wanted = f"[L, P, 2, {spec.num_kv_heads}, C, {spec.head_dim}]"
        reasons.append(f"kv_pages of shape {shape} do not have this implementation's layout {wanted}")
    return reasons


def make_schedule(kv_lens, page_indices, cu_q_lens, distribution, *, num_tokens: int, spec: AttentionSpec) -> Schedule:
    """See `api.make_schedule`."""
    group = spec.num_q_heads // spec.num_kv_heads
    queries = gpu_schedule.queries_a_row(group, spec.head_dim, spec.max_q_len)
    rows = tuple(jnp.asarray(array) for array in (kv_lens, page_indices, cu_q_lens, distribution))
    all_few = queries > 0 and queries == spec.max_q_len
    few = many = None
    if queries:
        few = gpu_schedule.make_decode_schedule(
            *rows, num_tokens=num_tokens, num_kv_heads=spec.num_kv_heads, page_size=spec.page_size, queries=queries,
            all_rows=all_few, blocks=gpu_blocks.decode_blocks(spec, queries, kv_lens.shape[0]),
        )  # fmt: skip
    if not all_few:
        many = gpu_prefill_schedule.make_prefill_schedule(
            *rows, num_tokens=num_tokens, group=group, page_size=spec.page_size, first_row_class=1 if queries else 0
        )
    return Schedule(few, many)


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    kv_pages: Array,
    layer: Array,
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    *,
    schedule: Schedule | None = None,
    scale: float,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    window: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    max_q_len: int | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """See `api.ragged_paged_attention`."""
    num_tokens, num_q_heads, head_dim = queries.shape
    if schedule is None:
        spec = AttentionSpec(num_q_heads, keys.shape[1], head_dim, kv_pages.shape[xla.PAGE_SIZE_AXIS], queries.dtype,
                             kv_pages.dtype, max_q_len, interpret=bool(interpret))  # fmt: skip
        schedule = make_schedule(kv_lens, page_indices, cu_q_lens, distribution, num_tokens=num_tokens, spec=spec)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    options = Options.make(scale, soft_cap, sinks, window, k_scale, v_scale)
    new = (to_page_dtype(keys, k_scale, kv_pages.dtype), to_page_dtype(values, v_scale, kv_pages.dtype))
    pages_ref = jax.new_ref(kv_pages)  # one buffer that the kernels read and write
    outputs = jnp.zeros_like(queries)
    if schedule.few is not None:
        outputs = gpu_decode.attend_few(queries, *new, pages_ref, layer, schedule.few, options, interpret=interpret)
    if schedule.many is not None:
        outputs = gpu_prefill.attend_many(queries, *new, pages_ref, layer, page_indices, schedule.many, options,
                                          outputs, interpret=interpret)  # fmt: skip
    return outputs, jax.freeze(pages_ref)


IMPLEMENTATION = AttentionImplementation(
    name="gpu",
    automatic=True,
    unsupported_reasons=unsupported_reasons,
    attend=attend,
    make_schedule=make_schedule,
    kv_pages_shape=xla.kv_pages_shape,
    kv_head_axis=xla.KV_HEAD_AXIS,
    page_size_axis=xla.PAGE_SIZE_AXIS,
    pages_to_dense=xla.pages_to_dense,
    dense_to_pages=xla.dense_to_pages,
)
