"""Ragged paged attention for rows with few queries on Hopper: swapped operands, split over context (Mosaic GPU).

A block is one compute warpgroup and one that brings keys and values by TMA, page by page, into a ring of tiles. It
walks over units of work (`gpu_schedule`), and the copies run ahead across the borders of units and rows. Keys and
values are the 64-row side of both products: S^T[tile, A] = K Q^T and O^T[H, A] = V^T P^T with A = Q * G columns, padded
to 8, for the G query heads and Q queries that share a kv head.

New keys and values go from registers into the tile in shared memory, and from the same registers to their page: no TMA
read depends on a write of the same launch. Values behind the row's end become zero there (0 * NaN is NaN).

A row that is split leaves (maximum, sum, unnormalised output) of each split, and a second small kernel combines them;
other rows are written at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu_softmax as softmax
from pallas_kernels.ragged_paged_attention.contract import Options
from pallas_kernels.ragged_paged_attention.gpu_combine import combine, write_output
from pallas_kernels.ragged_paged_attention.gpu_schedule import DecodeSchedule
from pallas_kernels.ragged_paged_attention.gpu_units import (
    COLUMNS,
    CONVERTED_ROWS,
    MATRIX_ROWS,
    MAX_FLOAT16,
    NOT_SEEN,
    NOTHING_SEEN,
    ROWS,
    SLAB_ROWS,
    Inputs,
    Memory,
    Shape,
    Unit,
    column_blocks,
    divide,
    for_each_slab,
    for_each_unit,
    is_partial,
    of_head,
    scratch,
    slab_layout,
)

# ---- the copying warpgroup -------------------------------------------------------------------------------------------


def bring_tiles(refs: Inputs, shape: Shape, memory: Memory) -> None:
    slots = shape.blocks.slots
    layer = refs.layer[0]

    def visit(unit: Unit, num_tiles: Array) -> Array:
        def bring(tile, index):
            slot = lax.rem(index, slots)
            # Read before the wait, which hides the latency.
            sources = [page_box(refs.schedule.table, unit.entry, tile, copy, shape) for copy in range(shape.copies)]

            @pl.when(index >= slots)
            def _():
                plgpu.barrier_wait(memory.used.at[slot])

            for which, tiles_s in enumerate((memory.k, memory.v)):
                for copy, (page, start) in enumerate(sources):
                    size = min(shape.tile, shape.page_size)
                    plgpu.copy_gmem_to_smem(
                        refs.pages.at[layer, page, which, unit.head, pl.ds(start, size)],
                        tiles_s.at[slot, pl.ds(copy * size, size)],
                        memory.ready.at[slot],
                    )
            return index + 1

        return lax.fori_loop(unit.first_tile, unit.end_tile, bring, num_tiles)

    total = for_each_unit(refs, shape, visit)

    def drain(i, _):  # every arrival is waited for
        plgpu.barrier_wait(memory.used.at[lax.rem(i, slots)])

    lax.fori_loop(jnp.maximum(total - slots, 0), total, drain, None)


def page_box(table, entry, tile, copy: int, shape: Shape) -> tuple[Array, Array | int]:
    """(page, first slot) of a copy."""
    if shape.page_size <= shape.tile:
        return table[entry, tile * shape.copies + copy], 0
    parts = shape.page_size // shape.tile
    return table[entry, lax.div(tile, parts)], pl.multiple_of(lax.rem(tile, parts) * shape.tile, shape.tile)


def write_silent(refs: Inputs, shape: Shape, outputs) -> None:
    """Zeros for the tokens of no active row, by the warpgroup that has nothing to compute."""
    zeros = plgpu.layout_cast(jnp.zeros((shape.head_dim,), outputs.dtype), ROWS)

    @pl.loop(lax.axis_index("block"), shape.num_tokens, step=shape.blocks.num_blocks)
    def _(token):
        @pl.when(refs.schedule.silent[token] > 0)
        def _():
            @pl.loop(0, shape.num_kv_heads * shape.group)
            def _(head):
                outputs.at[token, head][...] = zeros


# ---- the computing warpgroup -----------------------------------------------------------------------------------------


def compute_units(refs: Inputs, shape: Shape, memory: Memory, outputs, *partials) -> None:
    def visit(unit: Unit, num_tiles: Array) -> Array:
        load_queries(refs, shape, unit, memory.q)
        num_tiles, m, l, acc = attend_unit(refs, shape, memory, unit, num_tiles)

        if shape.unrolled:

            @pl.when(unit.splits == 1)
            def _():
                write_output(unit, shape, m, l, acc, outputs, refs.sinks, refs.v_scale)

        if partials:
            partial_acc, partial_ml = partials

            @pl.when(is_partial(unit, shape))
            def _():
                partial_acc.at[unit.slot][...] = acc
                partial_ml.at[unit.slot, 0][...] = m
                partial_ml.at[unit.slot, 1][...] = l

        return num_tiles

    for_each_unit(refs, shape, visit)


def attend_unit(refs: Inputs, shape: Shape, memory: Memory, unit: Unit, num_tiles: Array):
    """(tiles up to the unit's end, maximum f32[A], sum f32[A], unnormalised output f32[H, A])."""
    a = shape.columns
    factor = score_factor(refs, shape, unit.head)

    def step(tile, state):
        index, m, l, acc = state
        slot = lax.rem(index, shape.blocks.slots)
        plgpu.barrier_wait(memory.ready.at[slot])

        @pl.when((tile + 1) * shape.tile > unit.kv_len - unit.q_len)
        def _():
            add_new(refs, shape, unit, tile, memory, slot)

        k = operand_tile(memory.k.at[slot], memory.k16, shape)
        if shape.converted:
            plgpu.commit_smem()
        s = product(k, memory.q, (shape.tile, a))
        s = seen_scores(s, factor, refs, shape, unit, tile)
        m_new = jnp.maximum(m, s.max(axis=0))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s - lax.broadcast_in_dim(m_new, s.shape, [1]))
        memory.p.transpose((1, 0))[...] = p.astype(shape.dtype)
        # After the maximum, for which the warps met: none of them still multiplies the tile before.
        v = operand_tile(memory.v.at[slot], memory.v16, shape)
        plgpu.commit_smem()
        acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [1])
        acc += product(v.transpose((1, 0)), memory.p, (shape.head_dim, a))
        plgpu.barrier_arrive(memory.used.at[slot])
        return index + 1, m_new, l * alpha + p.sum(axis=0), acc

    m = plgpu.layout_cast(jnp.full((a,), NOTHING_SEEN, jnp.float32), COLUMNS)
    l = plgpu.layout_cast(jnp.zeros((a,), jnp.float32), COLUMNS)
    acc = plgpu.layout_cast(jnp.zeros((shape.head_dim, a), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(unit.first_tile, unit.end_tile, step, (num_tiles, m, l, acc))


def product(lhs, rhs_transposed, size: tuple[int, int]) -> Array:
    """f32 product of tiles in shared memory."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, lhs, rhs_transposed.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(size, jnp.float32))


def load_queries(refs: Inputs, shape: Shape, unit: Unit, q_s) -> None:
    """Rows of global memory into [A, H]; what no query head has there reaches no output.

    A group of fewer than 8 heads is no TMA box, and padding it in XLA would be one more launch a layer.
    """
    layout = slab_layout(MATRIX_ROWS)
    row = plgpu.broadcasted_iota(jnp.int32, (SLAB_ROWS, MATRIX_ROWS), 0, layout=layout)

    def load(first, num_columns: int = SLAB_ROWS) -> None:
        for part in range(0, shape.head_dim, MATRIX_ROWS):
            q = plgpu.layout_cast(jnp.zeros(row.shape, jnp.float32), layout)
            for c in range(num_columns):
                query, head = divide(first + c, shape.group)
                token = jnp.minimum(unit.token + query, shape.num_tokens - 1)
                source = refs.queries.at[token, unit.head * shape.group + head, pl.ds(part, MATRIX_ROWS)]
                x = plgpu.load(source, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
                q = jnp.where(row == c, lax.broadcast_in_dim(x, q.shape, [1]), q)
            if shape.dtype == jnp.float16:
                q = jnp.clip(q, -MAX_FLOAT16, MAX_FLOAT16)
            target = q_s.at[pl.ds(first, SLAB_ROWS), pl.ds(part, MATRIX_ROWS)]
            target[...] = q.astype(shape.dtype)

    for_each_slab(shape, load)
    plgpu.commit_smem()


def score_factor(refs: Inputs, shape: Shape, head) -> Array | float:
    """What a product is multiplied by, the scale of the pages' keys included."""
    factor = softmax.score_factor(shape.scale, shape.soft_cap)
    return factor if refs.k_scale is None else factor * of_head(refs.k_scale, head)


def seen_scores(s: Array, factor, refs: Inputs, shape: Shape, unit: Unit, tile) -> Array:
    """Scores in units of log2, NOT_SEEN where a column's query does not see the position."""
    s = s * factor
    if shape.soft_cap is not None:
        s = softmax.capped(s, shape.soft_cap)
    position = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA) + tile * shape.tile
    last = unit.kv_len - unit.q_len
    if shape.queries > 1:
        column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
        last = jnp.minimum(last + lax.div(column, jnp.int32(shape.group)), unit.kv_len - 1)
    seen = position <= last
    if refs.window is not None:
        window = refs.window[0]
        seen = jnp.logical_and(seen, position > last - jnp.where(window > 0, window, jnp.iinfo(jnp.int32).max // 2))
    return jnp.where(seen, s, NOT_SEEN)


def operand_tile(tile_s, converted_s, shape: Shape):
    """The tile itself, or its copy in a type that wgmma multiplies and that holds all its numbers.

    In the layout of slabs, where a lane has 8 neighbours of a row (4 at H 64): its loads and stores are wide, and int8
    becomes bfloat16 by byte permutation, four at a time.
    """
    if not shape.converted:
        return tile_s

    def convert(first) -> None:
        rows = pl.ds(first, CONVERTED_ROWS)
        for columns in column_blocks(shape):
            tile = plgpu.load(tile_s.at[rows, columns], layout=slab_layout(columns.size), optimized=False)
            converted_s.at[rows, columns][...] = tile.astype(shape.dtype)

    if shape.spare_registers:
        for first in range(0, shape.tile, CONVERTED_ROWS):
            convert(first)
    else:  # in a loop, or ptxas loads all of the tile first

        @pl.loop(0, shape.tile // CONVERTED_ROWS)
        def _(i):
            convert(pl.multiple_of(i * CONVERTED_ROWS, CONVERTED_ROWS))

    return converted_s


def add_new(refs: Inputs, shape: Shape, unit: Unit, tile, memory: Memory, slot) -> None:
    """Puts the unit's new keys and values that belong to the tile there and into their page; zeros behind the end.

    Slabs of 8 rows, the least that swizzled memory gives: whole tiles would be twice the registers of the rest.
    """
    begin = tile * shape.tile
    end = begin + shape.tile
    first_new = unit.kv_len - unit.q_len
    slab = slab_layout(column_blocks(shape)[0].size)
    parts = [(which, columns) for which in (0, 1) for columns in column_blocks(shape)]

    def position(first) -> Array:
        rows = plgpu.broadcasted_iota(jnp.int32, (SLAB_ROWS, column_blocks(shape)[0].size), 0, layout=slab)
        return rows + (begin + first)

    def change(which: int, columns, first, select: Callable[[Array], Array]) -> None:
        slab_s = (memory.k, memory.v)[which].at[slot, pl.ds(pl.multiple_of(first, SLAB_ROWS), SLAB_ROWS), columns]
        old = plgpu.load(slab_s, layout=slab, optimized=False)
        slab_s[...] = select(old.astype(jnp.float32)).astype(old.dtype)

    def write(at, _) -> None:
        page = refs.schedule.table[unit.entry, lax.div(at, shape.page_size)]
        row = refs.pages.at[refs.layer[0], page, :, unit.head, lax.rem(at, shape.page_size)]
        token = unit.token + at - first_new
        new = [plgpu.load((refs.keys, refs.values)[which].at[token, unit.head, columns], layout=slab.reduce(0),
                          optimized=False) for which, columns in parts]  # fmt: skip
        first = lax.div(at - begin, SLAB_ROWS) * SLAB_ROWS
        here = position(first) == at
        for (which, columns), x in zip(parts, new, strict=True):
            row.at[which, columns][...] = x
            x = lax.broadcast_in_dim(x.astype(jnp.float32), here.shape, [1])
            change(which, columns, first, lambda old, x=x: jnp.where(here, x, old))

    def clear(i, _) -> None:
        inside = position(i * SLAB_ROWS) < unit.kv_len
        for which, columns in parts[len(parts) // 2 :]:
            change(which, columns, i * SLAB_ROWS, lambda old: jnp.where(inside, old, 0))

    lax.fori_loop(jnp.maximum(first_new, begin), jnp.minimum(unit.kv_len, end), write, None)
    lax.fori_loop(lax.div(unit.kv_len - begin, SLAB_ROWS), shape.tile // SLAB_ROWS, clear, None)
    if not shape.converted:
        plgpu.commit_smem()


def attend_few(
    queries: Array,
    keys: Array,
    values: Array,
    pages_ref: Any,
    layer: Array,
    schedule: DecodeSchedule,
    options: Options,
    *,
    interpret: Any = False,
) -> Array:
    """Writes the new keys and values of the schedule's rows, then attends for their queries.

    Args: as `api.ragged_paged_attention`, and
      keys, values: [T, K, H] in the pages' dtype (`page_dtypes.to_page_dtype`).
      pages_ref: Ref of [L, P, 2, K, C, H].
      layer: i32[1].

    Returns:
      Outputs [T, N, H], zeros for the tokens of no active row; the tokens of active rows that the schedule does not
      have hold nothing of use.
    """
    num_tokens, num_q_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    shape = Shape(
        num_tokens=num_tokens, num_kv_heads=num_kv_heads, group=num_q_heads // num_kv_heads, head_dim=head_dim,
        page_size=pages_ref.shape[4], queries=schedule.queries, kv_dtype=pages_ref.dtype, scale=options.scale,
        soft_cap=options.soft_cap, blocks=schedule.blocks,
    )  # fmt: skip
    inputs = Inputs(
        queries=queries, keys=keys, values=values, pages=pages_ref, layer=layer, schedule=schedule,
        sinks=options.sinks, window=flat(options.window), k_scale=flat(options.k_scale), v_scale=flat(options.v_scale),
    )  # fmt: skip
    num_partials = schedule.rows.shape[0] * shape.blocks.max_splits * num_kv_heads
    outputs = jax.ShapeDtypeStruct(queries.shape, queries.dtype)
    partials = (jax.ShapeDtypeStruct((num_partials, head_dim, shape.columns), jnp.float32),
                jax.ShapeDtypeStruct((num_partials, 2, shape.columns), jnp.float32))  # fmt: skip
    results = plgpu.kernel(
        partial(attend_block, shape),
        out_type=(outputs, *partials) if shape.splits else (outputs,),
        grid=(shape.blocks.num_blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[scratch(shape)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(inputs)
    if not shape.splits:
        return results[0]
    outputs_ref = jax.new_ref(results[0])
    combine(outputs_ref, results[1], results[2], inputs, shape, interpret)
    return jax.freeze(outputs_ref)


def flat(option: Array | None) -> Array | None:
    return None if option is None else option.reshape(-1)


def attend_block(shape: Shape, refs: Inputs, outputs, *rest) -> None:
    *partials, memory = rest
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        compute_units(refs, shape, memory, outputs, *partials)

    @pl.when(warpgroup == 1)
    def _():
        bring_tiles(refs, shape, memory)
        write_silent(refs, shape, outputs)
