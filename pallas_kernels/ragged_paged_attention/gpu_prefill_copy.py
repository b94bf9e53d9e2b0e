"""The warpgroup of the Hopper prefill kernel that brings queries, keys and values by TMA."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.gpu_prefill_schedule import MATRIX_ROWS, NUM_COMPUTE_WARPGROUPS
from pallas_kernels.ragged_paged_attention.gpu_prefill_unit import (
    TILE_COLUMNS,
    Inputs,
    Shape,
    Shared,
    Unit,
    for_each_unit,
    has_tail,
    query_box,
)


def bring(shape: Shape, inputs: Inputs, shared: Shared) -> None:
    plgpu.set_max_registers(shape.registers[1], action="decrease")
    slots, query_slots = shape.blocks.slots, shape.blocks.query_slots
    bring_tiles = bring_converted if shape.converts else bring_direct

    def unit_step(turn: Array, unit: Unit, tiles_before: Array) -> Array:
        bring_queries(shape, inputs, shared, unit, turn)
        return bring_tiles(shape, inputs, shared, unit, tiles_before)

    num_turns, total = for_each_unit(shape, inputs, unit_step)

    # Every arrival has its wait.
    @pl.loop(jnp.maximum(total - slots, 0), total)
    def _(filled):
        plgpu.barrier_wait(shared.k_used.at[lax.rem(filled, slots)])
        plgpu.barrier_wait(shared.v_used.at[lax.rem(filled, slots)])

    @pl.loop(jnp.maximum(num_turns - query_slots, 0), num_turns)
    def _(turn):
        plgpu.barrier_wait(shared.q_used.at[lax.rem(turn, query_slots)])


def wait_for_slot(shape: Shape, used: Any, filled: Array) -> None:
    """Until both warpgroups are done with what lay in the slot that tile number `filled` takes."""

    @pl.when(filled >= shape.blocks.slots)
    def _():
        plgpu.barrier_wait(used.at[lax.rem(filled, shape.blocks.slots)])


def bring_direct(shape: Shape, inputs: Inputs, shared: Shared, unit: Unit, tiles_before: Array) -> Array:
    """The unit's tiles of bfloat16 pages, straight into their slots; returns the number of tiles so far."""
    slots = shape.blocks.slots

    def tile_step(tile: Array, filled: Array) -> Array:
        slot = lax.rem(filled, slots)
        wait_for_slot(shape, shared.k_used, filled)
        bring_tile(shape, inputs, unit, tile, 0, shared.k.at[slot], shared.k_full.at[slot])
        wait_for_slot(shape, shared.v_used, filled)
        # A tile with slots beyond the row lands at a barrier of its own and is complete when those are cleared.
        tail = (tile == unit.end_tile - 1) & has_tail(shape, unit)
        landing = shared.v_full.at[jnp.where(tail, slots, slot)]
        bring_tile(shape, inputs, unit, tile, 1, shared.v.at[slot], landing)

        @pl.when(tail)
        def _():
            plgpu.barrier_wait(landing)
            clear_tail(shape, shared.v.at[slot], unit.kv_len - tile * shape.blocks.kv_tokens)
            for _ in range(shape.pages_a_tile):
                plgpu.barrier_arrive(shared.v_full.at[slot])

        return filled + 1

    return lax.fori_loop(unit.first_tile, unit.end_tile, tile_step, tiles_before)


def bring_converted(shape: Shape, inputs: Inputs, shared: Shared, unit: Unit, tiles_before: Array) -> Array:
    """As `bring_direct` for 8-bit pages: a tile lands as it is and this warpgroup writes it to its slot as bfloat16,
    while the next one lands.
    """
    raw = ((shared.raw_k, shared.raw_k_full), (shared.raw_v, shared.raw_v_full))
    ready = ((shared.k, shared.k_used, shared.k_full), (shared.v, shared.v_used, shared.v_full))
    for which, (landing, landed) in enumerate(raw):
        bring_tile(shape, inputs, unit, unit.first_tile, which, landing, landed)

    def tile_step(tile: Array, filled: Array) -> Array:
        slot = lax.rem(filled, shape.blocks.slots)
        live = unit.kv_len - tile * shape.blocks.kv_tokens
        for which, ((landing, landed), (target, used, full)) in enumerate(zip(raw, ready, strict=True)):
            plgpu.barrier_wait(landed)
            wait_for_slot(shape, used, filled)
            convert(shape, landing, target.at[slot], (shape.head_dim, shape.columns)[which], live)
            plgpu.barrier_arrive(full.at[slot])

            @pl.when(tile + 1 < unit.end_tile)
            def _(which=which, landing=landing, landed=landed):
                bring_tile(shape, inputs, unit, tile + 1, which, landing, landed)

        return filled + 1

    return lax.fori_loop(unit.first_tile, unit.end_tile, tile_step, tiles_before)


def convert(shape: Shape, source: Any, target: Any, width: int, live: Array) -> None:
    """8-bit [kv_tokens, width] to bfloat16, zero from row `live` on (see `clear_tail`)."""
    for first_row in range(0, shape.blocks.kv_tokens, MATRIX_ROWS):
        for column in range(0, width, TILE_COLUMNS):
            part = (pl.ds(first_row, MATRIX_ROWS), pl.ds(column, TILE_COLUMNS))
            # By float32: sm_90 has no conversion from float8 to bfloat16.
            block = plgpu.load(source.at[part], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            rows = plgpu.broadcasted_iota(jnp.int32, block.shape, 0, layout=plgpu.Layout.WGMMA)
            target[part] = jnp.where(rows + first_row < live, block, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()


def bring_queries(shape: Shape, inputs: Inputs, shared: Shared, unit: Unit, turn: Array) -> None:
    slot = lax.rem(turn, shape.blocks.query_slots)

    @pl.when(turn >= shape.blocks.query_slots)
    def _():
        plgpu.barrier_wait(shared.q_used.at[slot])

    for warpgroup in range(NUM_COMPUTE_WARPGROUPS):
        for head in range(shape.heads):
            source = inputs.queries.at[query_box(shape, unit, warpgroup, head)]
            target = shared.q.at[slot, warpgroup, pl.ds(head * shape.queries, shape.queries)]
            plgpu.copy_gmem_to_smem(source, target, shared.q_full.at[slot])


def bring_tile(shape: Shape, inputs: Inputs, unit: Unit, tile: Array, which: int, target: Any, barrier: Any) -> None:
    """A tile of keys (which 0) or of the unit's values (1). Beyond the row's pages its last page comes again: never
    another's.
    """
    box, layer = shape.box_tokens, inputs.layer[0]
    columns = pl.ds(unit.column, shape.columns) if which else pl.ds(0, shape.head_dim)
    last_page = lax.div(unit.kv_len - 1, shape.page_size)
    for index in range(shape.pages_a_tile):
        position = tile * shape.blocks.kv_tokens + index * box
        page = inputs.table[unit.row, jnp.minimum(lax.div(position, shape.page_size), last_page)]
        slot = pl.multiple_of(lax.rem(position, shape.page_size), box)
        source = inputs.pages.at[layer, page, which, unit.kv_head, pl.ds(slot, box), columns]
        plgpu.copy_gmem_to_smem(source, target.at[pl.ds(index * box, box)], barrier)


def clear_tail(shape: Shape, values: Any, live: Array) -> None:
    """Zeroes the rows from `live` on of a tile of values [kv_tokens, columns]: probability 0 times NaN would be NaN."""
    for first_row in range(0, shape.blocks.kv_tokens, MATRIX_ROWS):

        @pl.when(live < first_row + MATRIX_ROWS)
        def _(first_row=first_row):
            for column in range(0, shape.columns, TILE_COLUMNS):
                part = values.at[pl.ds(first_row, MATRIX_ROWS), pl.ds(column, TILE_COLUMNS)]
                block = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                rows = plgpu.broadcasted_iota(jnp.int32, block.shape, 0, layout=plgpu.Layout.WGMMA)
                part[...] = jnp.where(rows + first_row < live, block, jnp.zeros_like(block))

    plgpu.commit_smem()
