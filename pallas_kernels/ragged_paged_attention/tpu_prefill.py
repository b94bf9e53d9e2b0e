"""Ragged paged attention on TPUs for rows with more than one query: prefill chunks and verification.

Two kernels: `tpu_write` puts the new keys and values into their pages, then `tpu_prefill_kernel` attends to pages only.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.contract import Options
from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import QUERY_ROWS, capped
from pallas_kernels.ragged_paged_attention.tpu_prefill_kernel import LOG2_E, Geometry, Stages, kernel
from pallas_kernels.ragged_paged_attention.tpu_prefill_schedule import (
    LANES,
    PrefillSchedule,
    padded_tokens,
    round_up,
)
from pallas_kernels.ragged_paged_attention.tpu_write import write


def attend_many(
    outputs: jax.Array,
    queries: jax.Array,
    new_kv: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array,
    schedule: PrefillSchedule,
    options: Options,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes the new keys and values of the schedule's rows, then attends.

    Args:
      outputs: [T0, N, H], T0 <= T: what the first tokens keep where they are not served here; others get zeros.
      queries: [T, N, H]; new_kv: [T, S, K, W] in the pages' dtype; kv_pages: [L, P, S, K, C, W]; layer: i32[1].
      schedule: of `make_prefill_schedule`; it alone says which rows are served.
    """
    kv_pages = write(new_kv, kv_pages, layer, schedule, interpret=interpret)
    geo = geometry(queries, kv_pages, schedule, options)
    (num_tokens, num_q_heads, head_dim), width = queries.shape, kv_pages.shape[-1]
    by_head = scaled_queries(queries, options, geo, width)
    laid_out = rows_of(by_head, schedule, geo) if geo.by_row else head_major(by_head, schedule, geo)
    results = call_kernel(geo, laid_out, outputs.dtype, kv_pages, layer, schedule, options, interpret)
    tokens = from_rows(results, schedule, geo) if geo.by_row else from_head_major(results, num_tokens)
    tokens = tokens.reshape(num_tokens, num_q_heads, width)[..., width - head_dim :]
    others = jnp.pad(outputs, ((0, num_tokens - outputs.shape[0]), (0, 0), (0, 0)))
    return jnp.where(schedule.served[:, None, None], tokens, others), kv_pages


def geometry(queries: jax.Array, kv_pages: jax.Array, schedule: PrefillSchedule, options: Options) -> Geometry:
    blocks = schedule.blocks if options.soft_cap is None else capped(schedule.blocks)
    _, _, num_kinds, num_kv_heads, page_size, _ = kv_pages.shape
    group = queries.shape[1] // num_kv_heads
    by_row = schedule.tokens is not None
    floats = jnp.float32 if jnp.float32 in (queries.dtype, kv_pages.dtype) else jnp.bfloat16
    return Geometry(
        blocks=blocks,
        by_row=by_row,
        group=group,
        rows=round_up(group * blocks.queries, QUERY_ROWS),
        period=blocks.queries,
        page_size=page_size,
        num_kinds=num_kinds,
        num_kv_heads=num_kv_heads,
        compute_dtype=floats,
        converted=kv_pages.dtype != floats and (not by_row or kv_pages.shape[-1] > LANES),
        soft_cap=options.soft_cap,
        sinks=options.sinks is not None,
        windowed=options.window is not None,
    )


def scaled_queries(queries: jax.Array, options: Options, geo: Geometry, width: int) -> jax.Array:
    """[T, K, G, W] in the compute dtype, with all that multiplies scores before the soft cap (else before exp2)."""
    num_tokens, _, head_dim = queries.shape
    factor = options.scale * (LOG2_E if geo.soft_cap is None else 1 / geo.soft_cap)
    factors = factor * by_kv_head(options.k_scale, geo)
    by_head = queries.astype(jnp.float32).reshape(num_tokens, geo.num_kv_heads, -1, head_dim)
    scaled = (by_head * factors[:, None, None]).astype(geo.compute_dtype)
    return jnp.pad(scaled, ((0, 0), (0, 0), (0, 0), (0, width - head_dim)))


def by_kv_head(scale: jax.Array | None, geo: Geometry) -> jax.Array:
    return jnp.broadcast_to(jnp.float32(1.0) if scale is None else scale, geo.num_kv_heads)


def head_major(by_head: jax.Array, schedule: PrefillSchedule, geo: Geometry) -> jax.Array:
    """[T, K, G, W] -> [K, G, T', W]."""
    num_tokens = by_head.shape[0]
    padding = padded_tokens(num_tokens, schedule.blocks) - num_tokens
    return jnp.pad(jnp.transpose(by_head, (1, 2, 0, 3)), ((0, 0), (0, 0), (0, padding), (0, 0)))


def from_head_major(results: jax.Array, num_tokens: int) -> jax.Array:
    return jnp.transpose(results[:, :, :num_tokens], (2, 0, 1, 3))


def rows_of(by_head: jax.Array, schedule: PrefillSchedule, geo: Geometry) -> jax.Array:
    """[T, K, G, W] -> [R, K, rows, W]: heads outside, a row's queries inside, zeros behind."""
    own = by_head[schedule.tokens].reshape(-1, geo.period, *by_head.shape[1:])
    operands = jnp.transpose(own, (0, 2, 3, 1, 4)).reshape(own.shape[0], geo.num_kv_heads, -1, own.shape[-1])
    return jnp.pad(operands, ((0, 0), (0, 0), (0, geo.rows - operands.shape[2]), (0, 0)))


def from_rows(results: jax.Array, schedule: PrefillSchedule, geo: Geometry) -> jax.Array:
    """[R, K, rows, W] -> [T, K, G, W]."""
    num_rows, num_kv_heads, _, width = results.shape
    own = results[:, :, : geo.group * geo.period].reshape(num_rows, num_kv_heads, geo.group, geo.period, width)
    by_place = jnp.transpose(own, (0, 3, 1, 2, 4)).reshape(-1, num_kv_heads, geo.group, width)
    return by_place.at[schedule.places].get(mode="clip")


def stages(geo: Geometry) -> Stages:
    """See `Stages`."""
    ways = [geo.units(masked) for masked in (True, False)]
    rows, num_buffers = max(units.rows for units in ways), max(units.num_buffers for units in ways)
    widths = (geo.blocks.compute, jnp.float32), (geo.blocks.compute, geo.compute_dtype), (LANES, jnp.float32)
    return Stages(*([pltpu.VMEM((1, rows, width), dtype)] * num_buffers for width, dtype in widths))


def call_kernel(
    geo: Geometry, laid_out, dtype, kv_pages, layer, schedule: PrefillSchedule, options: Options, interpret: Any
) -> jax.Array:
    """Outputs in the layout of `laid_out`; undefined where no item has a token."""
    window = jnp.int32(0) if options.window is None else options.window
    scalars = jnp.stack([layer.reshape(()), window, schedule.counts[0], *[jnp.int32(0)] * 3])
    sinks = jnp.zeros(1, jnp.float32) if options.sinks is None else options.sinks
    operand = (geo.num_kv_heads, geo.rows, kv_pages.shape[-1])
    line = (geo.num_kv_heads, geo.rows, LANES)
    block = (geo.block_pages, *kv_pages.shape[2:])
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        partial(kernel, geo),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[in_hbm] * 3,
            out_specs=in_hbm,
            scratch_shapes=[
                pltpu.VMEM((2, *operand), laid_out.dtype),
                pltpu.VMEM((2, *operand), dtype),
                pltpu.VMEM((2, *block), kv_pages.dtype),
                pltpu.SMEM((2, *schedule.pages.shape[1:]), jnp.int32),
                pltpu.VMEM(line, jnp.float32),
                pltpu.VMEM(line, jnp.float32),
                pltpu.VMEM(operand, jnp.float32),
                stages(geo),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                *([pltpu.VMEM((1, *block), geo.compute_dtype)] if geo.converted else []),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(laid_out.shape, dtype),
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=64 << 20),
        interpret=interpret,
        name="attend_many",
    )(schedule.items, scalars, by_kv_head(options.v_scale, geo), sinks, laid_out, schedule.pages, kv_pages)
