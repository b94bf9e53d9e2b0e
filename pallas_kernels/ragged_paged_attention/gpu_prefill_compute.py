# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false
"""The warpgroups of the Hopper prefill kernel that compute: scores, softmax, products with the values, outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.gpu_prefill_schedule import MATRIX_ROWS, TOKEN_ALIGNMENT
from pallas_kernels.ragged_paged_attention.gpu_prefill_unit import (
    TILE_COLUMNS,
    Inputs,
    Shape,
    Shared,
    Unit,
    for_each_unit,
)
from pallas_kernels.ragged_paged_attention.gpu_softmax import capped

# The maximum before any score: finite, so that a row which sees nothing of a tile subtracts no infinities.
NOTHING_SEEN = -1e30

type TileRef = Callable[[Array], Any]
type TileSlot = Callable[[Array], Array]


def compute(shape: Shape, inputs: Inputs, outputs: Any, shared: Shared, warpgroup: Array) -> None:
    plgpu.set_max_registers(shape.registers[0], action="increase")

    def unit_step(turn: Array, unit: Unit, tiles_before: Array) -> Array:
        query_slot = lax.rem(turn, shape.blocks.query_slots)
        plgpu.barrier_wait(shared.q_full.at[query_slot])
        attend_unit(shape, inputs, shared, unit, query_slot, warpgroup, tiles_before)
        store_unit(shape, outputs, shared, unit, shared.q.at[query_slot + unit.zero, warpgroup], warpgroup)
        plgpu.barrier_arrive(shared.q_used.at[query_slot])
        return tiles_before + unit.end_tile - unit.first_tile

    for_each_unit(shape, inputs, unit_step)
    plgpu.wait_smem_to_gmem(0)


def attend_unit(
    shape: Shape, inputs: Inputs, shared: Shared, unit: Unit, query_slot: Array, warpgroup: Array, tiles_before: Array
) -> None:
    """Attention of a warpgroup's 64 rows; the outputs take the place of the queries in their slot."""
    score_scale, window = inputs.score_scale[unit.kv_head], inputs.window[0] if shape.window else None
    rows = Rows(shape, unit, warpgroup, window, score_scale, inputs.columns)

    def queries_of(tile: Array) -> Any:
        return shared.q.at[query_slot + unit.zero * tile, warpgroup]

    def slot_of(tile: Array) -> Array:
        return lax.rem(tiles_before + tile - unit.first_tile, shape.blocks.slots)

    attend = attend_overlapped if shape.blocks.register_operands else attend_in_order
    l, acc = attend(rows, shared, queries_of, slot_of, *first_state(shape, inputs, unit))
    factor = inputs.output_scale[unit.kv_head] / l
    q = shared.q.at[query_slot + unit.zero, warpgroup]
    q[:, pl.ds(0, shape.columns)] = scaled(acc, factor).astype(jnp.bfloat16)
    plgpu.commit_smem()


@dataclass(frozen=True)
class Rows:
    """What the scores of a warpgroup's rows depend on besides queries and keys."""

    shape: Shape
    unit: Unit
    warpgroup: Array
    window: Array | None
    score_scale: Array
    columns: Any


def first_state(shape: Shape, inputs: Inputs, unit: Unit) -> tuple[Array, Array]:
    """(m, l) before any key; a sink is a score seen already, with no value."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    if shape.sinks:
        sinks = inputs.sinks.at[lax.div(unit.head, shape.heads)]
        return plgpu.load(sinks, layout=layout, optimized=False), row_of(1.0)
    return row_of(NOTHING_SEEN), row_of(0.0)


def row_of(value: float) -> Array:
    return plgpu.layout_cast(jnp.full((MATRIX_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zeros(shape: tuple[int, int]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def scores_accumulator(shape: Shape) -> Any:
    return plgpu.ACC((MATRIX_ROWS, shape.blocks.kv_tokens), jnp.float32)


def multiply_scores(shape: Shape, shared: Shared, q: Any, slot: Array) -> Array:
    """Scores f32[64, S] of the keys in `slot`, when they are there; the slot is free then."""

    def multiply(scores: Any) -> Array:
        plgpu.wgmma(scores, q, shared.k.at[slot].transpose((1, 0)))
        return scores[...]

    plgpu.barrier_wait(shared.k_full.at[slot])
    scores = pl.run_scoped(multiply, scores_accumulator(shape))
    plgpu.barrier_arrive(shared.k_used.at[slot])
    return scores


def softmax(rows: Rows, scores: Array, tile: Array, m: Array, l: Array) -> tuple[Array, Array, Array, Array]:
    """One tile of scores f32[64, S]: (p bf16[64, S], m, l, what the accumulator must be multiplied by), base 2."""
    shape, factor = rows.shape, rows.score_scale
    if shape.soft_cap is not None:
        scores, factor = capped(scores * factor, shape.soft_cap), None
    elif shape.scale <= 0:  # the largest product is not the largest score
        scores, factor = scores * factor, None
    scores = lax.cond(needs_mask(rows, tile), partial(mask, rows, tile), lambda scores: scores, scores)
    top = scores.max(axis=1)
    m_new = jnp.maximum(m, top if factor is None else top * factor)
    shifted = scores if factor is None else scores * factor
    p = jnp.exp2(shifted - lax.broadcast_in_dim(m_new, scores.shape, [0]))
    alpha = jnp.exp2(m - m_new)
    return p.astype(jnp.bfloat16), m_new, l * alpha + p.sum(axis=1), alpha


def needs_mask(rows: Rows, tile: Array) -> Array:
    unit, kv_tokens = rows.unit, rows.shape.blocks.kv_tokens
    beyond = (tile + 1) * kv_tokens > unit.first_position + 1
    if rows.window is None:
        return beyond
    return beyond | ((rows.window > 0) & (tile * kv_tokens < unit.end_position - rows.window))


def mask(rows: Rows, tile: Array, scores: Array) -> Array:
    """Minus infinity where a row does not see a key; m is finite, so that exp2 gives an exact zero.

    Column numbers come from memory: computed, they are kept in 64 registers from one tile to the next.
    """
    shape, unit = rows.shape, rows.unit
    # Rows are [heads][tokens], tokens a power of two.
    row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA) & (shape.queries - 1)
    shift = tile * shape.blocks.kv_tokens - unit.position - rows.warpgroup * shape.queries
    column = plgpu.load(rows.columns, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False) + shift
    key = lax.broadcast_in_dim(column, scores.shape, [1])
    seen = key <= row
    if rows.window is not None:
        seen &= key > row - jnp.where(rows.window > 0, rows.window, jnp.iinfo(jnp.int32).max // 2)
    return jnp.where(seen, scores, -jnp.inf)


def scaled(acc: Array, by_row: Array) -> Array:
    return acc * lax.broadcast_in_dim(by_row, acc.shape, [0])


# ---- tiles one after the other: what the interpreter runs ------------------------------------------------------------


def attend_in_order(
    rows: Rows, shared: Shared, queries_of: TileRef, slot_of: TileSlot, m: Array, l: Array
) -> tuple[Array, Array]:
    """(l, acc f32[64, columns]) of all tiles of a unit, probabilities through shared memory."""
    shape, unit = rows.shape, rows.unit
    accumulator = plgpu.ACC((MATRIX_ROWS, shape.columns))

    def step(tile: Array, state: tuple) -> tuple:
        m, l, acc = state
        slot = slot_of(tile)
        scores = multiply_scores(shape, shared, queries_of(tile), slot)
        p, m, l, alpha = softmax(rows, scores, tile, m, l)
        p_ref = shared.p.at[rows.warpgroup + unit.zero * tile]
        p_ref[...] = p
        plgpu.commit_smem()

        def multiply(product: Any) -> Array:
            plgpu.wgmma(product, p_ref, shared.v.at[slot])
            return product[...]

        plgpu.barrier_wait(shared.v_full.at[slot])
        acc = scaled(acc, alpha) + pl.run_scoped(multiply, accumulator)
        plgpu.barrier_arrive(shared.v_used.at[slot])
        return m, l, acc

    state = (m, l, zeros((MATRIX_ROWS, shape.columns)))
    _, l, acc = lax.fori_loop(unit.first_tile, unit.end_tile, step, state)
    return l, acc


# ---- scores of a tile beside the product of the tile before, operands in registers -----------------------------------


def attend_overlapped(
    rows: Rows, shared: Shared, queries_of: TileRef, slot_of: TileSlot, m: Array, l: Array
) -> tuple[Array, Array]:
    """As `attend_in_order`, with p and the accumulator as operands in registers."""
    shape, unit = rows.shape, rows.unit
    accumulator = plgpu.ACC((MATRIX_ROWS, shape.columns))
    # With 1 the address is the one that the outputs need: any other is a register more to the unit's end, and spilled.
    scores = multiply_scores(shape, shared, queries_of(jnp.int32(1)), slot_of(unit.first_tile))
    p, m, l, _ = softmax(rows, scores, unit.first_tile, m, l)

    def step(tile: Array, state: tuple) -> tuple:
        p, m, l, acc = state
        slot, last_slot = slot_of(tile), slot_of(tile - 1)

        def multiply(scores_ref: Any, acc_ref: Any) -> tuple:
            acc_ref[...] = acc
            plgpu.barrier_wait(shared.k_full.at[slot])
            plgpu.wgmma(scores_ref, queries_of(tile), shared.k.at[slot].transpose((1, 0)))
            plgpu.barrier_wait(shared.v_full.at[last_slot])
            plgpu.wgmma(acc_ref, p, shared.v.at[last_slot])
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            plgpu.barrier_arrive(shared.k_used.at[slot])
            new_p, new_m, new_l, alpha = softmax(rows, scores, tile, m, l)
            new_acc = acc_ref[...]
            plgpu.barrier_arrive(shared.v_used.at[last_slot])
            return new_p, new_m, new_l, scaled(new_acc, alpha)

        return pl.run_scoped(multiply, scores_accumulator(shape), accumulator)

    state = (p, m, l, zeros((MATRIX_ROWS, shape.columns)))
    p, _, l, acc = lax.fori_loop(unit.first_tile + 1, unit.end_tile, step, state)
    slot = slot_of(unit.end_tile - 1)

    def multiply_last(acc_ref: Any) -> Array:
        acc_ref[...] = acc
        plgpu.wgmma(acc_ref, p, shared.v.at[slot])
        return acc_ref[...]

    plgpu.barrier_wait(shared.v_full.at[slot])
    acc = pl.run_scoped(multiply_last, accumulator)
    plgpu.barrier_arrive(shared.v_used.at[slot])
    return l, acc


# ---- outputs ---------------------------------------------------------------------------------------------------------


def store_unit(shape: Shape, outputs: Any, shared: Shared, unit: Unit, q: Any, warpgroup: Array) -> None:
    """The tile's own tokens of the outputs [64, columns] in `q`: in boxes where all are, else token by token."""
    start = unit.token + warpgroup * shape.queries
    whole = (unit.first <= start) & (start + shape.queries <= unit.end)
    columns = pl.ds(unit.column, shape.columns)

    @pl.when(whole)
    def _():
        # A box is one piece of shared memory: of some columns only 8 rows are.
        box = shape.queries if shape.parts == 1 else TOKEN_ALIGNMENT
        for row in range(0, MATRIX_ROWS, box):
            token = pl.multiple_of(start + row % shape.queries, TOKEN_ALIGNMENT)
            target = outputs.at[pl.ds(token, box), unit.head + row // shape.queries, columns]
            plgpu.copy_smem_to_gmem(q.at[pl.ds(row, box), pl.ds(0, shape.columns)], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(jnp.logical_not(whole))
    def _():
        store_tokens(shape, outputs, unit, q, shared.edge.at[warpgroup + unit.zero], start)


def store_tokens(shape: Shape, outputs: Any, unit: Unit, q: Any, edge: Any, start: Array) -> None:
    """As `store_unit` for a tile that shares its tokens with other rows; `edge` [64, 64] is not tiled."""
    for column in range(0, shape.columns, TILE_COLUMNS):
        columns = pl.ds(unit.column + column, TILE_COLUMNS)
        edge[...] = plgpu.load(q.at[:, pl.ds(column, TILE_COLUMNS)], layout=plgpu.Layout.WGMMA)
        plgpu.commit_smem()

        @pl.loop(0, MATRIX_ROWS)
        def _(row, columns=columns):
            token = start + (row & (shape.queries - 1))

            @pl.when((token >= unit.first) & (token < unit.end))
            def _():
                head = unit.head + lax.div(row, shape.queries)
                plgpu.copy_smem_to_gmem(edge.at[pl.ds(row, 1)], outputs.at[token, pl.ds(head, 1), columns])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
