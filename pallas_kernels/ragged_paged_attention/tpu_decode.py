"""The TPU kernel for rows with exactly one query.

One kernel walks all rows. What it reads runs ahead of what it computes, across the ends of rows: page ids come from
HBM to scalar memory TABLES_AHEAD blocks before the pages they name are asked for, and pages `depth - 1` blocks before
they are used. Only tokens in use are fetched, in groups as they are tiled; the new token enters the group of the last
ones in VMEM, and that group goes back to its page.

A dead token (behind the row's last, before its window, or of a page that was not fetched) has its score masked. Its
value is multiplied by zero, so it must be finite: what the first blocks leave of the buffer is zeroed, and what is
behind the new token in its group is when the new one is put there.

Exponentials are powers of two: scores and maxima are in units of log 2.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.contract import Options
from pallas_kernels.ragged_paged_attention.tpu_decode_shapes import (
    LOG2_E,
    NUM_LANES,
    DecodeBlocks,
    Geometry,
    constants,
    from_tiles,
    make_geometry,
    to_tiles,
    to_words,
)
from pallas_kernels.ragged_paged_attention.tpu_schedule import PAGES_A_CHUNK, DecodeRows, ScalarLayout

# A block of pages takes about a microsecond to arrive and so does its part of the table: several are in flight.
TABLES_AHEAD, NUM_TABLE_SLOTS = 3, 4
# Finite, so that 0 * LOWEST is 0.
LOWEST = -1e30


# ---- the kernel ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refs:
    """The kernel's operands and scratch memory."""

    scalars: Any
    layer: Any
    window: Any  # None without a window
    table: Any
    queries: Any
    new_words: Any
    constants: dict[str, Any]
    outputs: Any
    kv_pages: Any
    kv: Any  # [depth, n, S, K, C, W]
    table_chunks: Any  # i32[NUM_TABLE_SLOTS, 1, PAGES_A_CHUNK] in SMEM
    ahead: Any  # i32[NUM_TABLE_SLOTS * 4] in SMEM: of each block whose pages are to be asked for, see `start_table`
    row_queries: Any  # [depth, num_tiles, tile_rows, W]
    row_words: Any  # u32[depth, S * K, W]
    row_outputs: Any  # [2, num_tiles, tile_rows, W]
    group: Any  # [2, S, K, group_rows, W], pieces of pages on their way back
    kv_arrived: Any
    table_arrived: Any
    row_arrived: Any
    outputs_left: Any
    group_left: Any


def log2(size: int) -> int:
    """Of a power of two."""
    return size.bit_length() - 1


def first_block(refs: Refs, geometry: Geometry, kv_len):
    """The first block that the query sees."""
    if refs.window is None:
        return jnp.int32(0)
    window = refs.window[0]
    return jnp.where(window > 0, jnp.maximum(kv_len - window, 0), 0) >> log2(geometry.kv)


def first_token(refs: Refs, end):
    """The first token of a block that the query sees, where the row ends `end` tokens behind the block's begin."""
    if refs.window is None:
        return jnp.int32(0)
    window = refs.window[0]
    return jnp.where(window > 0, jnp.maximum(end - window, 0), 0)


def start_table(refs: Refs, geometry: Geometry, step, cursor):
    """Asks for the page ids of the block that is `step`th in the order of computation, and moves the cursor behind it.

    Notes for `start_pages`: how far the row reaches from the block's begin (0 when there is no such block), the place
    of its ids in the chunk, its row's number among this core's (-1 unless it is the row's first block) and its token.
    """
    layout = ScalarLayout(refs.table.shape[0])
    number, block = cursor
    index = jnp.minimum(pl.program_id(0) + number * geometry.num_cores, layout.num_rows)
    kv_len = refs.scalars[layout.kv_len + index]
    slot = step & (NUM_TABLE_SLOTS - 1)
    page = block << log2(geometry.num_pages)
    row = refs.scalars[layout.row + index]
    chunk = refs.table.at[row, page >> log2(PAGES_A_CHUNK)]
    pltpu.make_async_copy(chunk, refs.table_chunks.at[slot], refs.table_arrived.at[slot]).start()
    first = first_block(refs, geometry, kv_len)
    refs.ahead[slot * 4] = jnp.maximum(kv_len - (block << log2(geometry.kv)), 0)
    refs.ahead[slot * 4 + 1] = page & (PAGES_A_CHUNK - 1)
    refs.ahead[slot * 4 + 2] = jnp.where((block == first) & (kv_len > 0), number, -1)
    refs.ahead[slot * 4 + 3] = refs.scalars[layout.token + index]
    more = ((block + 1) << log2(geometry.kv)) < kv_len
    following = jnp.minimum(pl.program_id(0) + (number + 1) * geometry.num_cores, layout.num_rows)
    first = first_block(refs, geometry, refs.scalars[layout.kv_len + following])
    return jnp.where(more, number, number + 1), jnp.where(more, block + 1, first)


def pages_of(refs: Refs, geometry: Geometry, end):
    """(first page, end of the whole pages, tokens of the page behind them) in use of a block, see `first_token`."""
    used = jnp.minimum(end, geometry.kv)
    begin = first_token(refs, end) >> log2(geometry.page_size)
    if geometry.group_rows == geometry.page_size:
        return begin, (used + geometry.page_size - 1) >> log2(geometry.page_size), None
    whole = used >> log2(geometry.page_size)
    rest = used - (whole << log2(geometry.page_size))
    return begin, whole, (rest + geometry.group_rows - 1) & -geometry.group_rows


def start_pages(refs: Refs, geometry: Geometry, step) -> None:
    """Asks for the pages of the block that is `step`th, and for its row's inputs."""
    table_slot, slot = step & (NUM_TABLE_SLOTS - 1), step & (geometry.depth - 1)
    chunk = refs.table_chunks.at[table_slot]
    pltpu.make_async_copy(chunk, chunk, refs.table_arrived.at[table_slot]).wait()
    end, offset = refs.ahead[table_slot * 4], refs.ahead[table_slot * 4 + 1]
    number, token = refs.ahead[table_slot * 4 + 2], refs.ahead[table_slot * 4 + 3]
    begin, whole, rest = pages_of(refs, geometry, end)
    arrived, layer = refs.kv_arrived.at[slot], refs.kv_pages.at[refs.layer[0]]
    ids = refs.table_chunks.at[table_slot, 0, pl.ds(offset, geometry.num_pages)]

    def copy(page, tokens=None):
        # The clamp proves what the compiled kernel does not check again: a page id is in range. Unsigned it is one
        # instruction.
        last = jnp.uint32(layer.shape[0] - 1)
        index = jnp.minimum(ids[page].astype(jnp.uint32), last).astype(jnp.int32)
        source, target = layer.at[index], refs.kv.at[slot, page]
        if tokens is not None:
            source, target = (ref.at[:, :, pl.ds(0, tokens)] for ref in (source, target))
        pltpu.make_async_copy(source, target, arrived).start()

    @pl.when(whole - begin == geometry.num_pages)
    def _():
        for page in range(geometry.num_pages):
            copy(page)

    @pl.when(whole - begin < geometry.num_pages)
    def _():
        pl.loop(begin, whole)(copy)
        if rest is not None:
            tokens = pl.multiple_of(rest, geometry.group_rows)
            pl.when(rest > 0)(lambda: copy(whole, tokens))

    @pl.when(number >= 0)
    def _():
        row_slot = number & (geometry.depth - 1)
        for source, target in ((refs.queries, refs.row_queries), (refs.new_words, refs.row_words)):
            pltpu.make_async_copy(source.at[token], target.at[row_slot], refs.row_arrived.at[row_slot]).start()


def wait_for_pages(refs: Refs, geometry: Geometry, slot, end) -> None:
    begin, whole, rest = pages_of(refs, geometry, end)
    arrived = refs.kv_arrived.at[slot]

    def wait_for_whole_pages():
        pages = refs.kv.at[slot, pl.ds(0, whole - begin)]
        pltpu.make_async_copy(pages, pages, arrived).wait()

    if rest is None:  # then there is at least one
        wait_for_whole_pages()
    else:
        pl.when(whole > begin)(wait_for_whole_pages)

        @pl.when(rest > 0)
        def _():
            tokens = refs.kv.at[slot, 0, :, :, pl.ds(0, pl.multiple_of(rest, geometry.group_rows))]
            pltpu.make_async_copy(tokens, tokens, arrived).wait()


def write_new(refs: Refs, geometry: Geometry, index, number, slot, end) -> None:
    """Puts the row's new token, `end - 1`th of the block in `slot`, into the block and into its page."""
    layout = ScalarLayout(refs.table.shape[0])
    rows, lanes = geometry.group_rows, geometry.width
    page, offset = (end - 1) >> log2(geometry.page_size), (end - 1) & (geometry.page_size - 1)
    at = pl.ds(pl.multiple_of(offset & -rows, rows), rows)
    stage = number & 1
    target = refs.kv_pages.at[
        refs.layer[0], jnp.minimum(refs.scalars[layout.last_page + index], refs.kv_pages.shape[1] - 1), :, :, at
    ]
    copy = pltpu.make_async_copy(refs.group.at[stage], target, refs.group_left.at[stage])
    pl.when(number >= 2)(copy.wait)
    dtype = refs.kv.dtype
    packing = 4 // jnp.dtype(dtype).itemsize
    bits = 32 // packing
    words = (rows // packing, lanes)
    row = (offset & (rows - 1)) - packing * lax.broadcasted_iota(jnp.int32, words, 0)  # within a sublane's word
    # Bits of the words that belong to the new token's row, and to it or the rows before it.
    here = (row >= 0) & (row < packing)
    shift = jnp.clip(row, 0, packing - 1) * bits
    element = jnp.uint32((1 << bits) - 1)
    shift = shift.astype(jnp.uint32)
    nothing, everything = jnp.uint32(0), jnp.uint32(0xFFFFFFFF)
    mine = jnp.where(here, element << shift, nothing)
    before = jnp.where(here, (jnp.uint32(1) << shift) - jnp.uint32(1), jnp.where(row < 0, nothing, everything))
    row_slot = number & (geometry.depth - 1)
    for part in range(geometry.num_parts):
        for head in range(geometry.num_kv_heads):
            new = part * geometry.num_kv_heads + head
            new = jnp.broadcast_to(refs.row_words[row_slot, new : new + 1, :], words)
            old = pltpu.bitcast(refs.kv[slot, page, part, head, at, :], jnp.uint32)
            kept = (old & before) | (new & mine)
            refs.kv[slot, page, part, head, at, :] = pltpu.bitcast(kept, dtype)
            refs.group[stage, part, head] = pltpu.bitcast((old & ~mine) | (new & mine), dtype)
    copy.start()


def attend_block(refs: Refs, geometry: Geometry, slot, row_slot, end, state, scale: float, soft_cap: float | None):
    """One block of context; state: of each tile (m f32[A, 1], l f32[A, 128], acc f32[A, W])."""
    token = lax.broadcasted_iota(jnp.int32, (geometry.tile_rows, geometry.kv), 1)
    seen = token < end
    if refs.window is not None:
        seen &= token >= first_token(refs, end)
    precision = lax.Precision.HIGHEST if geometry.compute_dtype == jnp.float32 else None
    dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    # Where values lie beside keys they would be read once for both products, and those of one byte, converted, wait in
    # registers for the second: up to 57 % of the bundles spilled (v5e). So they are read again: what is added is 0,
    # which the compiler does not know.
    values_slot = slot + (end >> 31) if geometry.num_parts == 1 else slot

    def matrix(part: int, head: int, slot) -> Array:
        pages = refs.kv[slot, :, part, head]
        pages = pages.reshape(geometry.kv, geometry.width)
        # Other pages the matrix unit takes as they are beside bfloat16 operands, which costs less than a conversion
        # (fp8, 512 tokens, 8 kv heads: 630 instead of 2120 bundles on v5e, 658 instead of 2113 on v6e).
        return pages.astype(jnp.float32) if geometry.compute_dtype == jnp.float32 else pages

    def products(tile: int, operand: Array, part: int, axis: int, slot) -> Array:
        """`operand` times a matrix whose contracted axis is `axis`, of each kv head in its rows of the tile."""
        heads = range(tile * geometry.heads_a_tile, (tile + 1) * geometry.heads_a_tile)
        result, *others = (dot(operand, matrix(part, head, slot), (((1,), (axis,)), ((), ()))) for head in heads)
        row = lax.broadcasted_iota(jnp.int32, result.shape, 0)
        for i, of_head in enumerate(others, start=1):
            result = jnp.where(row < i * geometry.group, result, of_head)
        return result

    tiles = range(geometry.num_tiles)
    queries = [refs.row_queries[row_slot, tile].astype(geometry.compute_dtype) for tile in tiles]
    scores = [products(tile, queries[tile], 0, 1, slot) for tile in tiles]
    softmax = []
    for tile in tiles:
        m, l, _ = state[tile]
        s = scores[tile] * capped_scale(refs, tile, scale, soft_cap)
        if soft_cap is not None:
            s = jnp.tanh(s) * (soft_cap * LOG2_E)
        s = jnp.where(seen, s, LOWEST)
        m_new = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        alpha, p = jnp.exp2(m - m_new), jnp.exp2(s - m_new)
        l = l * alpha + sum(p[:, i : i + NUM_LANES] for i in range(0, geometry.kv, NUM_LANES))
        softmax.append((m_new, l, alpha, p.astype(geometry.compute_dtype)))
    new_state = []
    for tile in tiles:
        m, l, alpha, p = softmax[tile]
        new_state.append((m, l, state[tile][2] * alpha + products(tile, p, geometry.num_parts - 1, 0, values_slot)))
    return tuple(new_state)


def capped_scale(refs: Refs, tile: int, scale: float, soft_cap: float | None):
    """What products are multiplied by: to units of log 2, or to those of the soft cap."""
    scale *= LOG2_E if soft_cap is None else 1 / soft_cap
    return refs.constants["k_scale"][tile][:, :1] * scale if "k_scale" in refs.constants else scale


def first_state(refs: Refs, geometry: Geometry):
    """Before any context; a sink is a score seen already, with no value. Its 1 is in one lane, for lanes are added."""
    rows = geometry.tile_rows
    acc = jnp.zeros((rows, geometry.width), jnp.float32)
    if "sinks" not in refs.constants:
        return ((jnp.full((rows, 1), LOWEST), jnp.zeros((rows, NUM_LANES)), acc),) * geometry.num_tiles
    l = (lax.broadcasted_iota(jnp.int32, (rows, NUM_LANES), 1) == 0).astype(jnp.float32)
    return tuple((refs.constants["sinks"][tile][:, :1], l, acc) for tile in range(geometry.num_tiles))


def write_outputs(refs: Refs, geometry: Geometry, index, number, state) -> None:
    layout = ScalarLayout(refs.table.shape[0])
    stage = number & 1
    target = refs.outputs.at[refs.scalars[layout.token + index]]
    copy = pltpu.make_async_copy(refs.row_outputs.at[stage], target, refs.outputs_left.at[stage])
    pl.when(number >= 2)(copy.wait)
    for tile, (_, l, acc) in enumerate(state):
        factor = 1 / jnp.sum(l, axis=1, keepdims=True)
        if "v_scale" in refs.constants:
            factor *= refs.constants["v_scale"][tile][:, :1]
        refs.row_outputs[stage, tile] = (acc * factor).astype(refs.row_outputs.dtype)
    copy.start()


def begin(refs: Refs, geometry: Geometry):
    """Zeroes values and starts the first copies; returns the cursor of `start_table`."""
    layout = ScalarLayout(refs.table.shape[0])
    first = jnp.minimum(pl.program_id(0), layout.num_rows)
    cursor = (jnp.int32(0), first_block(refs, geometry, refs.scalars[layout.kv_len + first]))
    for step in range(TABLES_AHEAD):
        cursor = start_table(refs, geometry, jnp.int32(step), cursor)

    def fill(step, cursor):
        zero_unfetched(refs, geometry, step)
        start_pages(refs, geometry, step)
        return start_table(refs, geometry, step + TABLES_AHEAD, cursor)

    cursor = lax.fori_loop(0, geometry.depth - 1, fill, cursor)
    zero_unfetched(refs, geometry, geometry.depth - 1)
    return cursor


def zero_unfetched(refs: Refs, geometry: Geometry, step) -> None:
    """Zeroes the values that the first block in a slot leaves as they are; later ones leave values of earlier ones."""
    end = refs.ahead[(step & (NUM_TABLE_SLOTS - 1)) * 4]
    begin, whole, _ = pages_of(refs, geometry, end)

    def zero(page) -> None:
        values = refs.kv.at[step, page, geometry.num_parts - 1]
        values[...] = jnp.zeros(values.shape, values.dtype)

    if refs.window is not None:
        pl.loop(0, begin)(zero)
    pl.loop(whole, jnp.where(end > 0, geometry.num_pages, 0))(zero)


def finish(refs: Refs, geometry: Geometry, num_mine, num_steps) -> None:
    """Waits for what is still under way."""
    for i in range(TABLES_AHEAD):
        slot = (num_steps + geometry.depth - 1 + i) & (NUM_TABLE_SLOTS - 1)
        chunk = refs.table_chunks.at[slot]
        pltpu.make_async_copy(chunk, chunk, refs.table_arrived.at[slot]).wait()

    @pl.loop(jnp.maximum(num_mine - 2, 0), num_mine)
    def _(number):
        stage = number & 1
        for ref, left in ((refs.group, refs.group_left), (refs.row_outputs, refs.outputs_left)):
            pltpu.make_async_copy(ref.at[stage], ref.at[stage], left.at[stage]).wait()


def zero_idle(refs: Refs, geometry: Geometry) -> None:
    """Outputs of idle tokens; core c takes every num_cores-th of them."""
    layout = ScalarLayout(refs.table.shape[0])
    core = pl.program_id(0)
    num_mine = lax.div(refs.scalars[layout.num_idle] - core + geometry.num_cores - 1, geometry.num_cores)

    @pl.when(num_mine > 0)
    def _():
        zeros, done = refs.row_outputs.at[0], refs.outputs_left.at[0]
        zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)

        @pl.loop(0, num_mine)
        def _(i):
            token = refs.scalars[layout.idle + core + i * geometry.num_cores]
            pltpu.make_async_copy(zeros, refs.outputs.at[token], done).start()

        @pl.loop(0, num_mine)
        def _(i):
            pltpu.make_async_copy(zeros, zeros, done).wait()


def kernel(refs: Refs, geometry: Geometry, scale: float, soft_cap: float | None) -> None:
    layout = ScalarLayout(refs.table.shape[0])
    core = pl.program_id(0)
    num_mine = lax.div(refs.scalars[layout.num_busy] - core + geometry.num_cores - 1, geometry.num_cores)
    cursor = begin(refs, geometry)

    def one_row(number, carry):
        index, row_slot = core + number * geometry.num_cores, number & (geometry.depth - 1)
        kv_len = refs.scalars[layout.kv_len + index]
        for ref in (refs.row_queries, refs.row_words):
            pltpu.make_async_copy(ref.at[row_slot], ref.at[row_slot], refs.row_arrived.at[row_slot]).wait()

        def one_block(block, carry):
            step, cursor, state = carry
            slot = step & (geometry.depth - 1)
            ahead = step + geometry.depth - 1
            start_pages(refs, geometry, ahead)
            end = kv_len - (block << log2(geometry.kv))
            wait_for_pages(refs, geometry, slot, end)
            pl.when(end <= geometry.kv)(lambda: write_new(refs, geometry, index, number, slot, end))
            # Here and not above: scalar work without branches costs nothing beside the matrix unit's.
            cursor = start_table(refs, geometry, ahead + TABLES_AHEAD, cursor)
            state = attend_block(refs, geometry, slot, row_slot, end, state, scale, soft_cap)
            return step + 1, cursor, state

        blocks = first_block(refs, geometry, kv_len), (kv_len + geometry.kv - 1) >> log2(geometry.kv)
        step, cursor, state = lax.fori_loop(*blocks, one_block, (*carry, first_state(refs, geometry)))
        write_outputs(refs, geometry, index, number, state)
        return step, cursor

    num_steps, _ = lax.fori_loop(0, num_mine, one_row, (jnp.int32(0), cursor))
    finish(refs, geometry, num_mine, num_steps)
    if refs.scalars.shape[0] > layout.idle:
        zero_idle(refs, geometry)


# ---- the call --------------------------------------------------------------------------------------------------------


def attend_decode(
    queries: Array,
    new_kv: Array,
    kv_pages: Array,
    layer: Array,
    rows: DecodeRows,
    options: Options,
    *,
    blocks: DecodeBlocks,
    max_pages: int,
    num_cores: int,
    interpret: Any,
) -> tuple[Array, Array]:
    """Outputs [T, N, H] and pages, for the rows of `rows`; outputs of all other tokens are zeros.

    Args:
      queries: [T, N, H].
      new_kv: [T, S, K, W] in the pages' dtype.
      kv_pages: [L, P, S, K, C, W].
    """
    head_dim = queries.shape[2]
    geometry = make_geometry(queries, kv_pages, max_pages, blocks, num_cores)
    wide = to_tiles(jnp.pad(queries, ((0, 0), (0, 0), (0, geometry.width - head_dim))), geometry)
    by_head = constants(options, geometry)
    window = () if options.window is None else (options.window.reshape(1),)
    prefetched = (rows.scalars, layer.reshape(1), *window)
    operands = (rows.table, wide, to_words(new_kv), *by_head.values(), kv_pages)
    layout = ScalarLayout(rows.table.shape[0])
    has_idle = rows.scalars.shape[0] > layout.idle

    def body(scalars, layer, *rest):
        window, rest = (rest[0], rest[1:]) if options.window is not None else (None, rest)
        table, queries, new_words, *rest = rest
        constant_refs, rest = dict(zip(by_head, rest, strict=False)), rest[len(by_head) :]
        _, *rest = rest if has_idle else rest[1:]
        outputs, kv_pages, *scratch = rest
        refs = Refs(scalars, layer, window, table, queries, new_words, constant_refs, outputs, kv_pages, *scratch)
        kernel(refs, geometry, options.scale, options.soft_cap)

    in_hbm, whole = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    zeros = () if has_idle else (jnp.zeros_like(wide),)
    aliases = {len(prefetched) + len(operands) - 1: 1}
    if zeros:
        aliases[len(prefetched) + len(operands)] = 0
    outputs, kv_pages = pl.pallas_call(
        body,
        out_shape=(jax.ShapeDtypeStruct(wide.shape, wide.dtype), jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(num_cores,),
            in_specs=[in_hbm] * 3 + [whole] * len(by_head) + [in_hbm] * (1 + len(zeros)),
            out_specs=(in_hbm, in_hbm),
            scratch_shapes=scratch_shapes(geometry, queries.dtype, kv_pages.dtype),
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            # Page ids are clamped in the kernel and every other index is a loop's or the schedule's.
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_bytes(geometry, kv_pages.dtype),
        ),
        interpret=interpret,
        name="ragged_paged_attention_decode",
    )(*prefetched, *operands, *zeros)
    return from_tiles(outputs, geometry, head_dim), kv_pages


def scratch_shapes(geometry: Geometry, dtype, kv_dtype) -> list:
    """In the order of `Refs`."""
    g = geometry
    tiles = (g.num_tiles, g.tile_rows, g.width)
    parts = (g.num_parts, g.num_kv_heads)
    return [
        pltpu.VMEM((g.depth, g.num_pages, *parts, g.page_size, g.width), kv_dtype),
        pltpu.SMEM((NUM_TABLE_SLOTS, 1, PAGES_A_CHUNK), jnp.int32),
        pltpu.SMEM((NUM_TABLE_SLOTS * 4,), jnp.int32),
        pltpu.VMEM((g.depth, *tiles), dtype),
        pltpu.VMEM((g.depth, g.num_parts * g.num_kv_heads, g.width), jnp.uint32),
        pltpu.VMEM((2, *tiles), dtype),
        pltpu.VMEM((2, *parts, g.group_rows, g.width), kv_dtype),
        *(pltpu.SemaphoreType.DMA((n,)) for n in (g.depth, NUM_TABLE_SLOTS, g.depth, 2, 2)),
    ]


def vmem_bytes(geometry: Geometry, kv_dtype) -> int:
    """The limit asked for: the buffer of pages and 16 MiB, the compiler's own default, for the rest."""
    g = geometry
    block = g.kv * g.num_parts * g.num_kv_heads * g.width * jnp.dtype(kv_dtype).itemsize
    return g.depth * block + (16 << 20)
