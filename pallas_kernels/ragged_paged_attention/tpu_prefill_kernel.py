"""The TPU kernel that attends with the rows of more than one query; their keys and values are in the pages already.

An item of work is a tile of packed tokens of one row (or a whole row of a few queries) with all heads. Its context
comes page by page into one of two buffers while the other is multiplied, across items too. Blocks that all queries see
are multiplied without masks; where the diagonal, the window's lower edge or the row's end crosses, smaller masked ones.

The queries of all heads of a kv head are the rows of one operand. Scores are kept in units of log2(e) (exp2 is what the
hardware has), the factor, the scale of keys and the inverse soft cap multiplied into the queries beforehand.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import QUERY_ROWS, PrefillBlocks
from pallas_kernels.ragged_paged_attention.tpu_prefill_schedule import ITEM_FIELDS, LANES
from pallas_kernels.ragged_paged_attention.tpu_prefill_units import Unit, Units
from pallas_kernels.ragged_paged_attention.tpu_write import select

LOG2_E = float(np.log2(np.e))
# Places in `Refs.scalars` that hold a 0 which the compiler does not know; see `attend_block`.
ZERO_A, ZERO_B, ZERO_C = 3, 4, 5
# Score of what must not be seen: finite, so that a row of which a block is all hidden has no NaN; what it adds is
# multiplied by exp2(LOWEST - score) = 0 when the first real score comes.
LOWEST = -1e30
# Copies that are started between two tests of a loop.
PAGES_AT_ONCE = 8
# Heads whose outputs are written without a loop between them: latencies of one are covered by the other.
HEADS_FINISHED = 2


@dataclass(frozen=True)
class Geometry:
    """Static facts of the kernel.

    Fields:
      by_row: items are whole rows, not tiles of packed tokens.
      group: G.
      rows: of an operand, G times the queries of an item (where items are rows, padded to whole packed tiles).
      period: a power of two; row m of an operand belongs to the item's query m % period.
      page_size, num_kinds: C, S.
      compute_dtype: of operands of the matrix unit.
      converted: whether pages of another dtype are converted a block at a time. Where items are rows, each head has
        hardly more than one unit, which does it itself (and spills where heads are wider than LANES).
    """

    blocks: PrefillBlocks
    by_row: bool
    group: int
    rows: int
    period: int
    page_size: int
    num_kinds: int
    num_kv_heads: int
    compute_dtype: Any
    converted: bool
    soft_cap: float | None
    sinks: bool
    windowed: bool

    def units(self, masked: bool) -> Units:
        """How the operands are cut: a unit's rows are whole packed tiles that divide an operand."""
        blocks = self.blocks
        more = masked or self.soft_cap is not None
        most, lead = (blocks.masked_rows, blocks.masked_lead) if more else (blocks.rows, blocks.lead)
        rows = max(n for n in range(QUERY_ROWS, most + 1, QUERY_ROWS) if self.rows % n == 0)
        a_head = self.rows // rows
        sizes = [n * a_head for n in range(1, self.num_kv_heads + 1) if self.num_kv_heads % n == 0]
        sizes += [n for n in range(1, a_head) if a_head % n == 0]
        return Units(rows, a_head, max(n for n in sizes if n <= blocks.at_once), lead, self.num_kv_heads)

    @property
    def block_pages(self) -> int:
        return self.blocks.fetch // self.page_size


class Stages(NamedTuple):
    """What units of work hand on, two `lead`s of buffers each: scores f32[1, rows, compute], exponentials of them in
    the compute dtype, and f32[1, rows, LANES], by how much earlier sums shrink.
    """

    scores: Any
    weights: Any
    decays: Any


class Refs(NamedTuple):
    """In scalar memory: items, scalars i32[6] (layer, window, count, 0, 0, 0), v_scale f32[K], sinks f32[N], page_ids
    i32[2, 1, M']. In HBM: queries and outputs [K, G, T', W] (tiles) or [R, K, rows, W] (rows), page_table
    i32[R, 1, M'], kv_pages. In VMEM: q_buf, o_buf [2, K, rows, W], kv_buf [2, pages, S, K, C, W], and of each head, in
    f32, the running maximum and the sums by lane [K, rows, LANES] and the accumulator [K, rows, W]. stages: see
    `Stages`. converted: [1, pages, S, K, C, W] in the compute dtype, the block in use, or None.
    """

    items: Any
    scalars: Any
    v_scale: Any
    sinks: Any
    queries: Any
    page_table: Any
    kv_pages: Any
    outputs: Any
    q_buf: Any
    o_buf: Any
    kv_buf: Any
    page_ids: Any
    maximum: Any
    total: Any
    accumulator: Any
    stages: Any
    q_sems: Any
    o_sems: Any
    old_sem: Any
    kv_sems: Any
    id_sems: Any
    converted: Any = None


class Item(NamedTuple):
    """One of `PrefillSchedule.items`, and what follows: the first and end block of its context."""

    row: Any
    start: Any
    low: Any
    high: Any
    position: Any
    first: Any
    end: Any

    @property
    def kv_end(self):
        return self.position + self.high


def item(geo: Geometry, refs: Refs, index) -> Item:
    row, start, low, high, position = [refs.items[index * ITEM_FIELDS + i] for i in range(ITEM_FIELDS)]
    fetch = geo.blocks.fetch
    first = lax.div(lowest_seen(geo, refs, position + low), fetch)
    return Item(row, start, low, high, position, first, lax.div(position + high + fetch - 1, fetch))


def lowest_seen(geo: Geometry, refs: Refs, position):
    """The first position that a query at `position` sees."""
    if not geo.windowed:
        return jnp.int32(0)
    window = refs.scalars[1]
    return jnp.where(window > 0, jnp.maximum(position - window + 1, 0), 0)


# Copies


def id_copy(refs: Refs, it: Item, index):
    slot = lax.rem(index, 2)
    return pltpu.make_async_copy(refs.page_table.at[it.row], refs.page_ids.at[slot], refs.id_sems.at[slot])


def tile_copies(geo: Geometry, hbm, buf, it: Item, sem, outward: bool) -> list:
    """Of an item's queries or outputs, between `hbm` and `buf` [K, rows, W]."""
    if geo.by_row:
        pairs = [(hbm.at[it.start], buf)]
    else:
        start, size = pl.multiple_of(it.start, QUERY_ROWS), geo.blocks.queries
        pairs = [(hbm.at[:, g, pl.ds(start, size), :], buf.at[:, pl.ds(g * size, size), :]) for g in range(geo.group)]
    ways = [(inside, outside) if outward else (outside, inside) for outside, inside in pairs]
    return [pltpu.make_async_copy(source, target, sem) for source, target in ways]


def query_copies(geo: Geometry, refs: Refs, it: Item, index) -> list:
    slot = lax.rem(index, 2)
    return tile_copies(geo, refs.queries, refs.q_buf.at[slot], it, refs.q_sems.at[slot], outward=False)


def output_copies(geo: Geometry, refs: Refs, it: Item, index) -> list:
    slot = lax.rem(index, 2)
    return tile_copies(geo, refs.outputs, refs.o_buf.at[slot], it, refs.o_sems.at[slot], outward=True)


def old_output_copies(geo: Geometry, refs: Refs, it: Item, index) -> list:
    return tile_copies(geo, refs.outputs, refs.o_buf.at[lax.rem(index, 2)], it, refs.old_sem, outward=False)


def is_shared(geo: Geometry, it: Item):
    """Whether an item's tile of outputs holds tokens that are not its own."""
    return False if geo.by_row else (it.low > 0) | (it.high < geo.blocks.queries)


def pages_in(geo: Geometry, it: Item, block):
    left = lax.div(it.kv_end + geo.page_size - 1, geo.page_size) - block * geo.block_pages
    return jnp.minimum(left, geo.block_pages)


def start_pages(geo: Geometry, refs: Refs, it: Item, index, block, slot) -> None:
    """Starts the copies of a block's pages; those beyond the item's last position are left out."""

    def start(i, _=None):
        page = refs.page_ids[lax.rem(index, 2), 0, block * geo.block_pages + i]
        source = refs.kv_pages.at[refs.scalars[0], page]
        pltpu.make_async_copy(source, refs.kv_buf.at[slot, i], refs.kv_sems.at[slot]).start()

    count = pages_in(geo, it, block)

    size = min(geo.block_pages, PAGES_AT_ONCE)

    def starts(i, _):
        for j in range(size):
            start(i * size + j)

    pl.when(count == geo.block_pages)(lambda: lax.fori_loop(0, geo.block_pages // size, starts, None))
    pl.when(count < geo.block_pages)(lambda: lax.fori_loop(0, count, start, None))


def wait_pages(geo: Geometry, refs: Refs, it: Item, block, slot) -> None:
    """One wait for all of a block's copies: a semaphore counts bytes."""
    arrived = refs.kv_buf.at[slot, pl.ds(0, pages_in(geo, it, block))]
    pltpu.make_async_copy(arrived, arrived, refs.kv_sems.at[slot]).wait()


# Arithmetic


def tokens_of(geo: Geometry, refs: Refs, block: "Block", kind: int, head) -> jax.Array:
    """Keys (kind 0) or values (-1) [S, W] of a head, in the compute dtype; the same where they lie side by side."""
    pages = pl.ds(block.first_page, block.num_pages)
    buffer, slot = (refs.converted, 0) if geo.converted else (refs.kv_buf, block.slot)
    found = buffer[slot + refs.scalars[ZERO_C], pages, kind % geo.num_kinds, head]
    return found.astype(geo.compute_dtype).reshape(block.num_pages * geo.page_size, -1)


def product(geo: Geometry, left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """f32: `left` [rows, x] times `right`, of which `axis` is x."""
    precision = lax.Precision.HIGHEST if geo.compute_dtype == jnp.float32 else None
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def visible(geo: Geometry, refs: Refs, it: Item, kv_start, row, num_rows: int, num_kv: int) -> jax.Array:
    """bool[num_rows, num_kv]: what rows `row ..` of an operand see of the positions from `kv_start` on."""
    query, position = (lax.broadcasted_iota(jnp.int32, (num_rows, num_kv), axis) for axis in (0, 1))
    offset = it.position - kv_start
    if geo.period % num_rows == 0:
        # Rows of consecutive queries: the same differences in all units, which differ by a scalar.
        offset = offset + (row & (geo.period - 1))
    else:
        query = (query + row) & (geo.period - 1)
    ahead = position - query
    if not geo.windowed:
        return ahead <= offset
    window = refs.scalars[1]
    reach = jnp.where(window > 0, window, jnp.int32(2**30))
    return (ahead <= offset) & (ahead > offset - reach)


class Block(NamedTuple):
    """What is multiplied at once: an item's number, a buffer, some pages of it and the position of their first token;
    item is None where no query needs a mask.
    """

    index: Any
    slot: Any
    first_page: Any
    num_pages: int
    kv_start: Any
    item: Item | None


def multiply_keys(geo: Geometry, refs: Refs, block: Block, unit: Unit) -> None:
    """Scores in units of log2(e) (before the soft cap: of it)."""
    keys = tokens_of(geo, refs, block, 0, unit.head)
    queries = refs.q_buf[lax.rem(block.index, 2), unit.head, pl.ds(unit.row, unit.num_rows)]
    scores = product(geo, queries, keys, 1)
    refs.stages.scores[unit.ring][refs.scalars[ZERO_A], : unit.num_rows, : keys.shape[0]] = scores


def weigh(geo: Geometry, refs: Refs, block: Block, unit: Unit) -> None:
    """Softmax so far: exponentials of the scores, and what they change of the state; a few rows after the other, so
    that few registers are in use.
    """
    size = max(n for n in range(QUERY_ROWS, geo.blocks.chunk + 1, QUERY_ROWS) if unit.num_rows % n == 0)
    for row in range(0, unit.num_rows, size):
        weigh_rows(geo, refs, block, unit, row, size)


def weigh_rows(geo: Geometry, refs: Refs, block: Block, unit: Unit, row: int, size: int) -> None:
    """`weigh` for rows `row .. row + size - 1` of a unit."""
    here, rows = slice(row, row + size), pl.ds(unit.row + row, size)
    num_kv, scores = block.num_pages * geo.page_size, refs.stages.scores[unit.ring]

    def masked(s, zero):
        if block.item is None:
            return s
        seen = visible(geo, refs, block.item, block.kv_start + zero, unit.row + row, size, num_kv)
        return jnp.where(seen, s, LOWEST)

    before = refs.maximum[unit.head, rows]
    # Read and masked twice: kept in registers from one use to the other, scores would be spilled.
    first_read, second_read = refs.scalars[ZERO_B], refs.scalars[ZERO_C]
    s = scores[first_read, here, :num_kv]
    if geo.soft_cap is not None:
        s = jnp.tanh(s) * (geo.soft_cap * LOG2_E)
        scores[refs.scalars[ZERO_A], here, :num_kv] = s
    top = jnp.maximum(before, jnp.max(masked(s, first_read), axis=1, keepdims=True))
    num_lines = num_kv // LANES
    s = masked(scores[second_read, here, :num_kv], second_read)
    p = jnp.exp2(s - jnp.concatenate([top] * num_lines, axis=1))
    decay = jnp.exp2(before - top)
    lines = [p[:, i * LANES : (i + 1) * LANES] for i in range(num_lines)]
    refs.maximum[unit.head, rows] = top
    refs.total[unit.head, rows] = refs.total[unit.head, rows] * decay + sum(lines[1:], lines[0])
    refs.stages.weights[unit.ring][refs.scalars[ZERO_A], here, :num_kv] = p.astype(geo.compute_dtype)
    refs.stages.decays[unit.ring][refs.scalars[ZERO_A], here] = decay


def multiply_values(geo: Geometry, refs: Refs, block: Block, unit: Unit) -> None:
    rows, here = pl.ds(unit.row, unit.num_rows), slice(0, unit.num_rows)
    values = tokens_of(geo, refs, block, -1, unit.head)
    weights = refs.stages.weights[unit.ring][refs.scalars[ZERO_B], here, : values.shape[0]]
    decay = refs.stages.decays[unit.ring][refs.scalars[ZERO_B], here]
    decays = jnp.concatenate([decay] * (values.shape[1] // LANES), axis=1)
    refs.accumulator[unit.head, rows] = refs.accumulator[unit.head, rows] * decays + product(geo, weights, values, 0)


def attend_block(geo: Geometry, refs: Refs, block: Block) -> None:
    """All heads against a block, unit by unit: while one goes through softmax, the matrix unit has the scores of one
    `lead` units later and the values of one `lead` units earlier.

    What they hand on lies in buffers, written and read at indices 0 that the compiler does not know to be equal: else
    it keeps it in registers and spills them.
    """
    units = geo.units(block.item is not None)
    lead = units.lead

    def group(g, _=None):
        for now in range(-lead, units.at_once + lead):
            for stage, number in ((multiply_values, now - lead), (multiply_keys, now + lead), (weigh, now)):
                if 0 <= number < units.at_once:
                    stage(geo, refs, block, units.unit(g, number))

    if units.num_groups == 1:
        group(0)
    else:
        lax.fori_loop(0, units.num_groups, group, None)


def clear_tail(geo: Geometry, refs: Refs, it: Item, block, slot) -> None:
    """Zeros the values behind the item's last position, as far as masked blocks go: a weight of 0 times NaN is NaN."""
    page, begin = geo.page_size, block * geo.blocks.fetch
    left = it.kv_end - begin
    end = lax.div(left + geo.blocks.masked - 1, geo.blocks.masked) * (geo.blocks.masked // page)

    def clear_page(i, _):
        def head(k, _):
            values = refs.kv_buf[slot, i, geo.num_kinds - 1, k]
            held = lax.broadcasted_iota(jnp.int32, values.shape, 0) < left - i * page
            refs.kv_buf[slot, i, geo.num_kinds - 1, k] = select(held, values, jnp.zeros_like(values))

        lax.fori_loop(0, geo.num_kv_heads, head, None)

    lax.fori_loop(lax.div(left, page), end, clear_page, None)


def convert(geo: Geometry, refs: Refs, slot, first, end) -> None:
    """Pages `first .. end - 1` of a buffer for the matrix unit, once for all units of their heads."""
    if not geo.converted:
        return

    def convert_page(i, _):
        def head(k, _):
            refs.converted[0, i, :, k] = refs.kv_buf[slot, i, :, k].astype(geo.compute_dtype)

        lax.fori_loop(0, geo.num_kv_heads, head, None)

    lax.fori_loop(first, end, convert_page, None)


def attend_fetched(geo: Geometry, refs: Refs, it: Item, index, block, slot) -> None:
    """All of a fetched block: without masks when all of it is seen by all of the item's queries."""
    blocks, page = geo.blocks, geo.page_size
    begin, end = block * blocks.fetch, (block + 1) * blocks.fetch
    last_low = lowest_seen(geo, refs, it.kv_end - 1)
    whole = (end <= it.position + it.low + 1) & (begin >= last_low)

    @pl.when(whole)
    def _():
        size = blocks.compute // page
        convert(geo, refs, slot, 0, geo.block_pages)

        def part(i, _):
            attend_block(geo, refs, Block(index, slot, i * size, size, begin + i * blocks.compute, None))

        lax.fori_loop(0, blocks.fetch // blocks.compute, part, None)

    @pl.when(jnp.logical_not(whole))
    def _():
        low = jnp.maximum(lowest_seen(geo, refs, it.position + it.low), begin) - begin
        high = jnp.minimum(it.kv_end, end) - begin
        size = blocks.masked // page
        first, last = lax.div(low, blocks.masked), lax.div(high + blocks.masked - 1, blocks.masked)
        pl.when(it.kv_end < end)(lambda: clear_tail(geo, refs, it, block, slot))
        convert(geo, refs, slot, first * size, last * size)

        def part(i, _):
            attend_block(geo, refs, Block(index, slot, i * size, size, begin + i * blocks.masked, it))

        lax.fori_loop(first, last, part, None)


def clear(geo: Geometry, refs: Refs, h) -> None:
    """The state of a head before the first block; a sink is a score seen already, of no value."""
    refs.accumulator[h] = jnp.zeros(refs.accumulator.shape[1:], jnp.float32)
    if not geo.sinks:
        refs.maximum[h] = jnp.full(refs.maximum.shape[1:], LOWEST, jnp.float32)
        refs.total[h] = jnp.zeros(refs.total.shape[1:], jnp.float32)
        return
    refs.total[h] = jnp.where(lax.broadcasted_iota(jnp.int32, refs.total.shape[1:], 1) == 0, 1.0, 0.0)
    row = lax.broadcasted_iota(jnp.int32, refs.maximum.shape[1:], 0)
    top = jnp.full(refs.maximum.shape[1:], LOWEST, jnp.float32)
    for g in range(geo.group):
        top = jnp.where(row >= g * geo.period, refs.sinks[h * geo.group + g] * LOG2_E, top)
    refs.maximum[h] = top


def inverse_sums(geo: Geometry, lanes: jax.Array) -> jax.Array:
    """1 over the sum over lanes, in each lane."""
    sums = jnp.sum(lanes, axis=1, keepdims=True)
    inverse = 1 / sums if geo.compute_dtype == jnp.float32 else pltpu.reciprocal(sums, approx=True)
    return jnp.broadcast_to(inverse, lanes.shape)


def finish(geo: Geometry, refs: Refs, it: Item, index) -> None:
    """Writes the item's outputs to their buffer, among what tokens of others had where the tile has such, and clears
    the state for the next item: a loop of those stores alone would leave all other slots empty.
    """
    slot, dtype = lax.rem(index, 2), refs.o_buf.dtype
    shared = is_shared(geo, it)

    def head(h, merge: bool):
        factor = inverse_sums(geo, refs.total[h]) * refs.v_scale[h]
        factors = jnp.concatenate([factor] * (refs.accumulator.shape[2] // LANES), axis=1)
        new = (refs.accumulator[h] * factors).astype(dtype)
        if merge:
            query = lax.broadcasted_iota(jnp.int32, new.shape, 0) & (geo.period - 1)
            new = jnp.where((query >= it.low) & (query < it.high), new, refs.o_buf[slot, h])
        refs.o_buf[slot, h] = new
        clear(geo, refs, h)

    def heads(merge: bool):
        at_once = next(n for n in (HEADS_FINISHED, 1) if geo.num_kv_heads % n == 0)

        def some(i, _):
            for n in range(at_once):
                head(i * at_once + n, merge)

        lax.fori_loop(0, geo.num_kv_heads // at_once, some, None)

    if geo.by_row:
        heads(merge=False)
        return

    @pl.when(shared)
    def _():
        for copy in old_output_copies(geo, refs, it, index):
            copy.wait()
        heads(merge=True)

    pl.when(jnp.logical_not(shared))(lambda: heads(merge=False))


def prepare_outputs(geo: Geometry, refs: Refs, it: Item, index) -> None:
    """Makes the output buffer free; where the tile has tokens of others, starts to bring what they hold."""

    def wait(before) -> None:
        for copy in output_copies(geo, refs, item(geo, refs, before), before):
            copy.wait()

    if geo.by_row:
        pl.when(index >= 2)(lambda: wait(index - 2))
        return
    shared, shared_before = is_shared(geo, it), is_shared(geo, item(geo, refs, jnp.maximum(index - 1, 0)))
    # A shared tile waits for all outputs before it: the neighbour's tokens are among them.
    pl.when((index >= 2) & jnp.logical_not(shared_before))(lambda: wait(index - 2))
    pl.when((index >= 1) & shared)(lambda: wait(index - 1))

    @pl.when(shared)
    def _():
        for copy in old_output_copies(geo, refs, it, index):
            copy.start()


def attend_item(geo: Geometry, refs: Refs, index, count, done):
    """One item; `done` blocks were attended before, which says which buffer is next."""
    it = item(geo, refs, index)
    following = item(geo, refs, jnp.minimum(index + 1, count - 1))
    is_last = index + 1 == count

    @pl.when(jnp.logical_not(is_last))
    def _():
        id_copy(refs, following, index + 1).start()
        for copy in query_copies(geo, refs, following, index + 1):
            copy.start()

    prepare_outputs(geo, refs, it, index)
    for copy in query_copies(geo, refs, it, index):
        copy.wait()

    def block(b, done):
        slot = lax.rem(done, 2)
        more = b + 1 < it.end
        pl.when(more)(lambda: start_pages(geo, refs, it, index, b + 1, 1 - slot))

        @pl.when(jnp.logical_not(more | is_last))
        def _():
            id_copy(refs, following, index + 1).wait()
            start_pages(geo, refs, following, index + 1, following.first, 1 - slot)

        wait_pages(geo, refs, it, b, slot)
        attend_fetched(geo, refs, it, index, b, slot)
        return done + 1

    done = lax.fori_loop(it.first, it.end, block, done)
    finish(geo, refs, it, index)
    for copy in output_copies(geo, refs, it, index):
        copy.start()
    return done


def kernel(geo: Geometry, *args) -> None:
    refs = Refs(*args)
    count = refs.scalars[2]

    @pl.when(count > 0)
    def _():
        start = jnp.int32(0)
        first = item(geo, refs, start)
        id_copy(refs, first, start).start()
        for copy in query_copies(geo, refs, first, start):
            copy.start()
        id_copy(refs, first, start).wait()
        start_pages(geo, refs, first, start, first.first, start)
        lax.fori_loop(0, geo.num_kv_heads, lambda h, _: clear(geo, refs, h), None)

    lax.fori_loop(0, count, lambda index, done: attend_item(geo, refs, index, count, done), jnp.int32(0))
    drain_outputs(geo, refs, count)


def drain_outputs(geo: Geometry, refs: Refs, count) -> None:
    def wait(index) -> None:
        for copy in output_copies(geo, refs, item(geo, refs, index), index):
            copy.wait()

    last = jnp.maximum(count - 1, 0)
    # A last item of a shared tile has waited for the one before it.
    waited = is_shared(geo, item(geo, refs, last))
    pl.when((count >= 2) & jnp.logical_not(waited))(lambda: wait(count - 2))
    pl.when(count >= 1)(lambda: wait(count - 1))
