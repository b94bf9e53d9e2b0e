"""Results of Hopper decode: normalised, written by query head; splits of a row are added by a kernel of their own."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.gpu_softmax import LOG2_E
from pallas_kernels.ragged_paged_attention.gpu_units import (
    COLUMNS,
    COMBINED_COLUMNS,
    MATRIX_ROWS,
    NOTHING_SEEN,
    SLAB_ROWS,
    Inputs,
    Shape,
    Unit,
    divide,
    is_partial,
    of_head,
    read_unit,
)


def write_output(
    unit: Unit, shape: Shape, m: Array, l: Array, acc: Array, outputs, sinks_ref, v_scale, first_row: Array | int = 0
) -> None:
    """Normalises acc [rows of H, A] and writes each column to its query head, from row `first_row` of H on."""
    if sinks_ref is not None:
        sinks = read_sinks(sinks_ref, shape, unit.head) * LOG2_E
        with_sink = jnp.maximum(m, sinks)
        rescale = jnp.exp2(m - with_sink)
        l = l * rescale + jnp.exp2(sinks - with_sink)
        acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [1])
    factor = 1 / jnp.where(l > 0, l, 1)
    if v_scale is not None:
        factor = factor * of_head(v_scale, unit.head)
    acc = acc * lax.broadcast_in_dim(factor, acc.shape, [1])
    column = plgpu.broadcasted_iota(jnp.int32, (acc.shape[0], SLAB_ROWS), 1, layout=plgpu.Layout.WGMMA)
    for first in range(0, shape.columns, SLAB_ROWS):
        slab = acc[:, first : first + SLAB_ROWS]

        def write(c, first: int = first, slab: Array = slab) -> None:
            query, head = divide(first + c, shape.group)

            @pl.when(query < unit.q_len)
            def _():
                one = jnp.where(column == c, slab, 0).sum(axis=1)
                target = outputs.at[unit.token + query, unit.head * shape.group + head, pl.ds(first_row, acc.shape[0])]
                target[...] = one.astype(outputs.dtype)

        if shape.unrolled:
            for c in range(min(SLAB_ROWS, shape.queries * shape.group - first)):
                write(c)
        else:
            pl.loop(0, SLAB_ROWS)(write)


def read_sinks(sinks_ref, shape: Shape, head) -> Array:
    """f32[A]: of the query head of each column."""
    column = plgpu.broadcasted_iota(jnp.int32, (shape.columns,), 0, layout=COLUMNS)
    found = plgpu.layout_cast(jnp.zeros((shape.columns,), jnp.float32), COLUMNS)
    for g in range(shape.group):
        mine = lax.rem(column, jnp.int32(shape.group)) == g
        found = jnp.where(mine, sinks_ref[head * shape.group + g], found)
    return found


def combine(outputs_ref: Any, acc: Array, ml: Array, inputs: Inputs, shape: Shape, interpret: Any) -> None:
    """Adds the splits of the rows that have several and writes their outputs; 64 of H a step of a block."""
    parts = shape.head_dim // MATRIX_ROWS
    units = inputs.schedule.rows.shape[0] * shape.num_kv_heads * parts
    num_blocks = min(units, shape.blocks.combine_blocks)
    used = (inputs.schedule.rows, inputs.sinks, inputs.v_scale)

    def combine_block(acc_ref, ml_ref, used, out_ref):
        rows, sinks, v_scale = used

        @pl.loop(lax.axis_index("block"), units, step=num_blocks)
        def _(index):
            pair = lax.div(index, parts)
            first_row = pl.multiple_of(lax.rem(index, parts) * MATRIX_ROWS, MATRIX_ROWS)
            unit = read_unit(lax.div(pair, shape.num_kv_heads), lax.rem(pair, shape.num_kv_heads), 0, rows, shape)

            @pl.when(is_partial(unit, shape))
            def _():
                m, l, o = sum_splits(acc_ref, ml_ref, unit, first_row, shape)
                write_output(unit, shape, m, l, o, out_ref, sinks, v_scale, first_row)

    plgpu.kernel(
        combine_block,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(acc, ml, used, outputs_ref)


def sum_splits(acc_ref, ml_ref, unit: Unit, first_row: Array, shape: Shape) -> tuple[Array, Array, Array]:
    """(m, l, acc) of all splits of a unit's row, the loads of several in flight."""
    a, unroll = shape.columns, max(1, COMBINED_COLUMNS // shape.columns)

    def step(i, state):
        m, l, acc = state
        found = []
        for j in range(unroll):
            split = i * unroll + j
            at = unit.slot + jnp.minimum(split, unit.splits - 1)
            new_m = plgpu.load(ml_ref.at[at, 0], layout=COLUMNS, optimized=False)
            new_l = plgpu.load(ml_ref.at[at, 1], layout=COLUMNS, optimized=False)
            new = plgpu.load(acc_ref.at[at, pl.ds(first_row, MATRIX_ROWS)], layout=plgpu.Layout.WGMMA, optimized=False)
            found.append((new_m, new_l, new, jnp.where(split < unit.splits, 1.0, 0.0)))
        m_new = m
        for new_m, *_ in found:
            m_new = jnp.maximum(m_new, new_m)
        scale = jnp.exp2(m - m_new)
        l, acc = l * scale, acc * lax.broadcast_in_dim(scale, acc.shape, [1])
        for new_m, new_l, new, mine in found:
            scale = jnp.exp2(new_m - m_new) * mine
            l, acc = l + new_l * scale, acc + new * lax.broadcast_in_dim(scale, acc.shape, [1])
        return m_new, l, acc

    m = plgpu.layout_cast(jnp.full((a,), NOTHING_SEEN, jnp.float32), COLUMNS)
    l = plgpu.layout_cast(jnp.zeros((a,), jnp.float32), COLUMNS)
    acc = plgpu.layout_cast(jnp.zeros((MATRIX_ROWS, a), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, lax.div(unit.splits + unroll - 1, unroll), step, (m, l, acc))
