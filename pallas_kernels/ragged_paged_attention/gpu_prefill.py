# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false
"""Ragged paged attention for rows with many queries on Hopper: warp-specialised, persistent, causal (Mosaic GPU).

A block is two compute warpgroups and one that brings queries, keys and values by TMA. It walks over units of work, each
a tile of queries of one row and one kv head (`gpu_prefill_schedule`). The 64 matrix rows of a compute warpgroup are
[heads][tokens]: as many query heads of the kv head as are a power of two, so that a short chunk still fills the matrix
unit, and the causal limit of a row is that of token `row % tokens`. Both warpgroups share every tile of keys and
values: 128 rows a byte of K and V, with or without heads folded in.

Scores of tile j + 1 are multiplied while the probabilities of tile j multiply the values, and the softmax of tile j + 1
starts when its scores are there (`wait_n=1`), over the second product. That form keeps probabilities and accumulator in
registers (`register_operands=True`), which Pallas' interpreter cannot run. It is not the default before it has run on
a card: the other form does one thing after the other, with the probabilities through shared memory and each product
added to the accumulator, at H 256 for half of the values at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import current_device
from pallas_kernels.ragged_paged_attention import gpu_prefill_schedule as tiles
from pallas_kernels.ragged_paged_attention.contract import Options
from pallas_kernels.ragged_paged_attention.gpu_blocks import prefill_blocks
from pallas_kernels.ragged_paged_attention.gpu_prefill_compute import compute
from pallas_kernels.ragged_paged_attention.gpu_prefill_copy import bring
from pallas_kernels.ragged_paged_attention.gpu_prefill_schedule import MATRIX_ROWS, NUM_COMPUTE_WARPGROUPS
from pallas_kernels.ragged_paged_attention.gpu_prefill_unit import (
    TILE_COLUMNS,
    Inputs,
    PrefillBlocks,
    Shape,
    Shared,
)
from pallas_kernels.ragged_paged_attention.gpu_softmax import LOG2_E, score_factor
from pallas_kernels.ragged_paged_attention.gpu_write import write_new

# bfloat16 in shared memory as wgmma and TMA exchange it: 8 rows of 64 columns, 128 bytes, swizzled.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# 8-bit tiles are only read into registers, 64 columns at a time.
TILED_8_BIT = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64))
OPTIONAL_SCRATCH = ("p", "raw_k", "raw_v", "raw_k_full", "raw_v_full")


def attend_many(
    queries: Array,
    keys: Array,
    values: Array,
    pages_ref: Any,
    layer: Array,
    page_indices: Array,
    schedule: tiles.PrefillSchedule,
    options: Options,
    outputs: Array,
    *,
    blocks: PrefillBlocks | None = None,
    interpret: Any = False,
) -> Array:
    """Writes the new keys and values of the schedule's rows, then attends for their queries.

    Args: as `api.ragged_paged_attention`, and
      keys, values: [T, K, H] in the pages' dtype (`page_dtypes.to_page_dtype`).
      pages_ref: Ref of [L, P, 2, K, C, H].
      layer: i32[] or i32[1].
      schedule: of the rows to serve, with their lengths.
      outputs: [T, N, H] in the dtype of the queries: the result holds its values for all other tokens.

    Returns:
      Outputs [T, N, H]. XLA reuses the buffer of `outputs` where T is a multiple of 8 and at least one tile.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads, page_size = pages_ref.shape[3:5]
    group = num_heads // num_kv_heads
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    write_new(keys, values, pages_ref, layer, schedule.destinations, interpret=interpret)
    shape = Shape(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        scale=options.scale,
        soft_cap=options.soft_cap,
        sinks=options.sinks is not None,
        window=options.window is not None,
        kv_dtype=jnp.dtype(pages_ref.dtype),
        blocks=blocks
        or prefill_blocks(head_dim, pages_ref.dtype, group, page_size, current_device(), interpret=bool(interpret)),
    )
    padding = ((0, tiles.padded_tokens(num_tokens, group) - num_tokens), (0, 0), (0, 0))
    outputs_ref = jax.new_ref(jnp.pad(outputs, padding))
    arrays = dict(
        queries=jnp.pad(queries, padding),
        pages=pages_ref,
        items=schedule.items,
        count=schedule.count,
        table=page_indices,
        layer=layer,
        **option_arrays(options, shape),
    )
    call_kernel(shape, arrays, outputs_ref, interpret)
    return jax.freeze(outputs_ref)[:num_tokens]


def option_arrays(options: Options, shape: Shape) -> dict[str, Array]:
    """The traced options as the kernel reads them."""

    def by_kv_head(scale: Array | None, factor: float) -> Array:
        return jnp.broadcast_to(jnp.asarray(1.0 if scale is None else scale, jnp.float32) * factor, shape.num_kv_heads)

    sinks = jnp.zeros((1, MATRIX_ROWS), jnp.float32)
    if options.sinks is not None:
        sinks = jnp.repeat(options.sinks * LOG2_E, shape.queries).reshape(-1, MATRIX_ROWS)
    return {
        "window": jnp.asarray(0 if options.window is None else options.window, jnp.int32).reshape(1),
        "score_scale": by_kv_head(options.k_scale, score_factor(options.scale, options.soft_cap)),
        "output_scale": by_kv_head(options.v_scale, 1.0),
        "sinks": sinks,
        "columns": jnp.arange(shape.blocks.kv_tokens, dtype=jnp.int32),
    }


def call_kernel(shape: Shape, arrays: dict[str, Any], outputs_ref: Any, interpret: Any) -> None:
    names = tuple(arrays)

    def body(*refs, **scratch):
        inputs, outputs = Inputs(**dict(zip(names, refs, strict=False))), refs[len(names)]
        shared = Shared(**dict.fromkeys(OPTIONAL_SCRATCH) | scratch)
        warpgroup = lax.axis_index("wg")
        pl.when(warpgroup < NUM_COMPUTE_WARPGROUPS)(lambda: compute(shape, inputs, outputs, shared, warpgroup))
        pl.when(warpgroup == NUM_COMPUTE_WARPGROUPS)(lambda: bring(shape, inputs, shared))

    plgpu.kernel(
        body,
        out_type=(),
        grid=(shape.blocks.num_blocks,),
        grid_names=("block",),
        num_threads=NUM_COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch_types(shape),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*arrays.values(), outputs_ref)


def scratch_types(shape: Shape) -> dict[str, Any]:
    blocks, width = shape.blocks, shape.head_dim

    def tile(columns: int) -> Any:
        return plgpu.SMEM((blocks.slots, blocks.kv_tokens, columns), jnp.bfloat16, transforms=TILED)

    def raw(columns: int) -> Any:
        return plgpu.SMEM((blocks.kv_tokens, columns), shape.kv_dtype, transforms=TILED_8_BIT)

    used = plgpu.Barrier(num_arrivals=NUM_COMPUTE_WARPGROUPS, num_barriers=blocks.slots)
    rows = (NUM_COMPUTE_WARPGROUPS, MATRIX_ROWS)
    full = plgpu.Barrier(num_arrivals=1 if shape.converts else shape.pages_a_tile, num_barriers=blocks.slots + 1)
    scratch = {
        "q": plgpu.SMEM((blocks.query_slots, *rows, width), jnp.bfloat16, transforms=TILED),
        "k": tile(width),
        "v": tile(shape.columns),
        "edge": plgpu.SMEM((*rows, TILE_COLUMNS), jnp.bfloat16),
        "q_full": plgpu.Barrier(num_arrivals=NUM_COMPUTE_WARPGROUPS * shape.heads, num_barriers=blocks.query_slots),
        "q_used": plgpu.Barrier(num_arrivals=NUM_COMPUTE_WARPGROUPS, num_barriers=blocks.query_slots),
        "k_full": full,
        "k_used": used,
        "v_full": full,
        "v_used": used,
    }
    if not blocks.register_operands:
        scratch["p"] = plgpu.SMEM((*rows, blocks.kv_tokens), jnp.bfloat16, transforms=TILED)
    if shape.converts:
        landed = plgpu.Barrier(num_arrivals=shape.pages_a_tile)
        scratch |= {"raw_k": raw(width), "raw_v": raw(shape.columns), "raw_k_full": landed, "raw_v_full": landed}
    return scratch
