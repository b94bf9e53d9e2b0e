"""Ragged paged attention on TPUs: Mosaic kernels that read pages where they lie and write the new tokens into them.

Pages are `[L, P, 2, K, C, H]`, head-major, so that a (page, kv head) is one contiguous C x H matrix. Memory is tiled by
128 lanes: narrower heads have keys and values side by side, `[L, P, 1, K, C, 2H]`, and nothing is padded.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.devices import tpu_reasons
from pallas_kernels.dispatch import Device
from pallas_kernels.ragged_paged_attention.contract import (
    AttentionImplementation,
    AttentionSpec,
    Options,
    common_reasons,
)
from pallas_kernels.ragged_paged_attention.page_dtypes import SCALED, to_page_dtype
from pallas_kernels.ragged_paged_attention.tpu_decode import DecodeBlocks, attend_decode
from pallas_kernels.ragged_paged_attention.tpu_prefill import attend_many
from pallas_kernels.ragged_paged_attention.tpu_schedule import Schedule, make_schedule

KV_HEAD_AXIS = 3
PAGE_SIZE_AXIS = 4
NUM_LANES = 128
DTYPES = ("float32", "bfloat16")
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)


def is_packed(head_dim: int) -> bool:
    """Whether keys and values lie side by side in the lanes."""
    return head_dim < NUM_LANES


def kv_pages_shape(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype) -> tuple[int, ...]:
    del dtype
    parts, width = (1, 2 * head_dim) if is_packed(head_dim) else (2, head_dim)
    return (num_layers, num_pages, parts, num_kv_heads, page_size, width)


def unsupported_reasons(spec: AttentionSpec) -> list[str]:
    reasons = common_reasons(spec) + tpu_reasons(spec.device, spec.interpret)
    for name, value, known in (
        ("dtype", jnp.dtype(spec.dtype).name, DTYPES),
        ("kv_dtype", jnp.dtype(spec.kv_dtype).name, DTYPES + SCALED),
        ("head_dim", spec.head_dim, HEAD_DIMS),
        ("page_size", spec.page_size, PAGE_SIZES),
    ):
        if value not in known:
            reasons.append(f"{name} {value} is not one of {', '.join(map(str, known))}")
    shape = spec.kv_pages_shape
    wanted = kv_pages_shape(0, 0, spec.page_size, spec.num_kv_heads, spec.head_dim, spec.kv_dtype)[2:]
    if shape is not None and shape[2:] != wanted:
        layout = ", ".join(map(str, ("L", "P", *wanted)))
        reasons.append(f"kv_pages of shape {shape} do not have this implementation's layout [{layout}]")
    return reasons


def num_cores(device: Device) -> int:
    """Cores that share a kernel: 2 where a chip is one device of two cores (v4, v5p)."""
    return pltpu.get_tpu_info().num_cores if device.platform == "tpu" else 1


def decode_key(num_kv_heads: int, head_dim: int, kv_dtype, page_size: int, max_context: int) -> dict[str, str | int]:
    """Of `tuned/ragged_paged_attention_decode.json`. Heads are a word: blocks for others may not fit VMEM."""
    return {
        "kv_dtype": jnp.dtype(kv_dtype).name,
        "heads": f"{num_kv_heads} x {head_dim}",
        "page_size": page_size,
        "max_context": max_context,
    }


def decode_blocks(kv_pages: Array, max_pages: int, device: Device) -> DecodeBlocks:
    """What was tuned for the device, the dtype of the pages and the heads; else `default_decode_blocks`.

    Args:
      kv_pages: [L, P, S, K, C, W].
      max_pages: of a row.
    """
    num_parts, num_kv_heads, page_size, width = kv_pages.shape[2:]
    key = decode_key(num_kv_heads, width * num_parts // 2, kv_pages.dtype, page_size, max_pages * page_size)
    tuned = tuning.lookup("ragged_paged_attention_decode", device.kind, **key)
    return DecodeBlocks(**tuned) if tuned else default_decode_blocks(num_kv_heads, width, num_parts, kv_pages.dtype)


def default_decode_blocks(num_kv_heads: int, width: int, num_parts: int, kv_dtype) -> DecodeBlocks:
    """A megabyte or more a block, so that one is computed while the next table arrives; 32 MiB in VMEM at most.

    A product of float32 is six of bfloat16: shorter blocks, fewer spills.
    """
    itemsize = jnp.dtype(kv_dtype).itemsize
    token_bytes = num_kv_heads * width * num_parts * itemsize
    kv = 256 if itemsize == 4 else 512
    while kv < 2048 and kv * token_bytes < 1 << 20:
        kv *= 2
    while kv > 128 and 4 * kv * token_bytes > 32 << 20:
        kv //= 2
    return DecodeBlocks(kv=kv, depth=4)


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
    blocks: DecodeBlocks | None = None,
) -> tuple[Array, Array]:
    """See `api.ragged_paged_attention`; `blocks` is for tests and measurements."""
    num_tokens, num_q_heads, head_dim = queries.shape
    num_kv_heads, page_size = kv_pages.shape[3:5]
    spec = AttentionSpec(num_q_heads, num_kv_heads, head_dim, page_size, queries.dtype, kv_pages.dtype, max_q_len)
    if schedule is None:
        schedule = make_schedule(kv_lens, page_indices, cu_q_lens, distribution, num_tokens=num_tokens, spec=spec)
    options = Options.make(scale, soft_cap, sinks, window, k_scale, v_scale)
    new_kv = join(to_page_dtype(keys, k_scale, kv_pages.dtype), to_page_dtype(values, v_scale, kv_pages.dtype))
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    # Rows of one query come first, so their tokens are among the first of as many as there are rows.
    first = num_tokens if schedule.many is None else min(num_tokens, kv_lens.shape[0])
    outputs = jnp.zeros((0, *queries.shape[1:]), queries.dtype)
    if schedule.decode is not None:
        outputs, kv_pages = attend_decode(
            queries[:first], new_kv[:first], kv_pages, layer, schedule.decode, options,
            blocks=blocks or decode_blocks(kv_pages, page_indices.shape[1], spec.device),
            max_pages=page_indices.shape[1], num_cores=num_cores(spec.device), interpret=interpret,
        )  # fmt: skip
    if schedule.many is not None:
        outputs, kv_pages = attend_many(
            outputs, queries, new_kv, kv_pages, layer, schedule.many, options, interpret=interpret
        )
    return outputs, kv_pages


def join(keys: Array, values: Array) -> Array:
    """[.., K, H] twice to [.., S, K, W]."""
    if is_packed(keys.shape[-1]):
        return jnp.concatenate([keys, values], axis=-1)[..., None, :, :]
    return jnp.stack([keys, values], axis=-3)


# ---- pages in and out ------------------------------------------------------------------------------------------------


def pages_to_dense(kv_pages: Array, layer: Array, page_indices_row: Array, kv_len: Array | int) -> tuple[Array, Array]:
    page_size = kv_pages.shape[PAGE_SIZE_AXIS]
    used = jnp.where(jnp.arange(page_indices_row.shape[0]) * page_size < kv_len, page_indices_row, 0)
    pages = kv_pages[jnp.asarray(layer, jnp.int32).reshape(()), used]  # [M, S, K, C, W]
    dense = jnp.moveaxis(pages, 3, 1).reshape(-1, *pages.shape[1:3], pages.shape[4])  # [M * C, S, K, W]
    if isinstance(kv_len, int):
        dense = dense[:kv_len]
    dense = jnp.where((jnp.arange(dense.shape[0]) < kv_len)[:, None, None, None], dense, 0)
    if dense.shape[1] == 2:
        return dense[:, 0], dense[:, 1]
    keys, values = jnp.split(dense[:, 0], 2, axis=-1)
    return keys, values


def dense_to_pages(kv_pages: Array, layer: Array, page_indices_row: Array, keys: Array, values: Array) -> Array:
    positions = jnp.arange(keys.shape[0])
    page_size = kv_pages.shape[PAGE_SIZE_AXIS]
    new = jnp.stack([keys, values], axis=1)
    if kv_pages.shape[2] == 1:
        new = jnp.concatenate([new[:, :1], new[:, 1:]], axis=-1)
    layer = jnp.asarray(layer, jnp.int32).reshape(())
    pages = jnp.asarray(page_indices_row)[positions // page_size]
    at = kv_pages.at[layer, pages, :, :, positions % page_size]
    return at.set(new.astype(kv_pages.dtype), mode="drop")


IMPLEMENTATION = AttentionImplementation(
    name="tpu",
    automatic=True,
    unsupported_reasons=unsupported_reasons,
    attend=attend,
    make_schedule=make_schedule,
    kv_pages_shape=kv_pages_shape,
    kv_head_axis=KV_HEAD_AXIS,
    page_size_axis=PAGE_SIZE_AXIS,
    pages_to_dense=pages_to_dense,
    dense_to_pages=dense_to_pages,
)
