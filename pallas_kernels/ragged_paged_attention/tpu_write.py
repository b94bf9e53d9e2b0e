"""The TPU kernel that writes new keys and values into their pages, an aligned group of slots at a time.

Copies to and from tiled memory start at whole tiles, so a group is read, merged in registers and written back; slots
that are not written keep their bytes. A group of which all slots are written is not read.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import WINDOW_ROWS
from pallas_kernels.ragged_paged_attention.tpu_prefill_schedule import (
    LANES,
    WRITE_FIELDS,
    PrefillSchedule,
    padded_tokens,
    window_rows,
)

NUM_GROUPS = 3  # one being read ahead, one being merged, one being written
# Of groups of few slots some heads are merged together: what one waits for, others fill.
HEADS_AT_ONCE, SHORT = 4, 32
# More rows than that are merged in parts: with 128 rows of int8 5.1 % of the bundles spilled (v5p; 0.5 % in parts).
ROWS_AT_ONCE = 64


class Refs(NamedTuple):
    """Buffers: windows [2, S, K, window, W] and groups [NUM_GROUPS, S, K, write, W] in the pages' dtype, shifted
    f32[S, K, W / LANES, write + window + write, LANES], in the middle of which a window lies so that any shift of it is
    inside.
    """

    writes: Any
    scalars: Any
    new_kv: Any
    kv_pages: Any
    windows: Any
    groups: Any
    shifted: Any
    window_sems: Any
    read_sems: Any
    write_sems: Any


class Item(NamedTuple):
    """One of `PrefillSchedule.writes`."""

    page: Any
    slot: Any
    low: Any
    high: Any
    window: Any
    shift: Any


def item(refs: Refs, index) -> Item:
    return Item(*(refs.writes[index * WRITE_FIELDS + i] for i in range(WRITE_FIELDS)))


def window_copy(refs: Refs, it: Item, index):
    size = refs.windows.shape[3]
    source = refs.new_kv.at[:, :, pl.ds(pl.multiple_of(it.window, WINDOW_ROWS), size), :]
    slot = lax.rem(index, 2)
    return pltpu.make_async_copy(source, refs.windows.at[slot], refs.window_sems.at[slot])


def in_pages(refs: Refs, it: Item):
    size = refs.groups.shape[3]
    return refs.kv_pages.at[refs.scalars[0], it.page, :, :, pl.ds(pl.multiple_of(it.slot, size), size), :]


def read_copy(refs: Refs, it: Item, index):
    slot = lax.rem(index, NUM_GROUPS)
    return pltpu.make_async_copy(in_pages(refs, it), refs.groups.at[slot], refs.read_sems.at[slot])


def write_copy(refs: Refs, it: Item, index):
    slot = lax.rem(index, NUM_GROUPS)
    return pltpu.make_async_copy(refs.groups.at[slot], in_pages(refs, it), refs.write_sems.at[slot])


def is_partial(refs: Refs, it: Item):
    return (it.low > 0) | (it.high < refs.groups.shape[3])


def start_reads(refs: Refs, index) -> None:
    """Brings the new tokens of an item and, unless all its slots are written, what they held."""

    @pl.when(index >= NUM_GROUPS)
    def _():
        write_copy(refs, item(refs, index - NUM_GROUPS), index - NUM_GROUPS).wait()

    it = item(refs, index)
    window_copy(refs, it, index).start()
    pl.when(is_partial(refs, it))(lambda: read_copy(refs, it, index).start())


def merge(refs: Refs, it: Item, index) -> None:
    """Puts the window's rows into the group's slots `low .. high - 1`, shifting them in 32 bits and one line of lanes
    after the other: rows of packed types or of several lines cannot be moved by an offset that is not known.
    """
    num_kinds, num_heads, size, width = refs.groups.shape[1:]
    dtype, window_size = refs.groups.dtype, refs.windows.shape[3]
    step = min(size, ROWS_AT_ONCE)
    at = lax.broadcasted_iota(jnp.int32, (step, LANES), 0)
    at_once = math.gcd(num_heads, HEADS_AT_ONCE if size <= SHORT else 1)
    parts = list(itertools.product(range(at_once), range(num_kinds), range(width // LANES)))

    def heads(i, _):
        for j, s, line in parts:
            k, lanes = i * at_once + j, slice(line * LANES, (line + 1) * LANES)
            window = refs.windows[lax.rem(index, 2), s, k, :, lanes].astype(jnp.float32)
            refs.shifted[s, k, line, pl.ds(size, window_size), :] = window
        for (j, s, line), first in itertools.product(parts, range(0, size, step)):
            k, lanes, rows = i * at_once + j, slice(line * LANES, (line + 1) * LANES), pl.ds(first, step)
            new = refs.shifted[s, k, line, pl.ds(size + it.shift + first, step), :]
            old = refs.groups[lax.rem(index, NUM_GROUPS), s, k, rows, lanes]
            written = (at >= it.low - first) & (at < it.high - first)
            merged = select(written, new.astype(dtype), old)
            refs.groups[lax.rem(index, NUM_GROUPS), s, k, rows, lanes] = merged

    lax.fori_loop(0, num_heads // at_once, heads, None)


def select(condition, new, old):
    """Byte for byte; 8-bit floats are chosen between as integers (there is no other selection of them)."""
    if new.dtype.itemsize > 1:
        return jnp.where(condition, new, old)
    return pltpu.bitcast(jnp.where(condition, pltpu.bitcast(new, jnp.int8), pltpu.bitcast(old, jnp.int8)), new.dtype)


def kernel(*args) -> None:
    # The pages arrive twice: as operand and, aliased, as result; all reads and writes go through the result.
    writes, scalars, new_kv, _, *rest = args
    refs = Refs(writes, scalars, new_kv, *rest)
    count = scalars[1]
    pl.when(count > 0)(lambda: start_reads(refs, jnp.int32(0)))

    def body(index, _):
        it = item(refs, index)
        pl.when(index + 1 < count)(lambda: start_reads(refs, index + 1))
        window_copy(refs, it, index).wait()
        pl.when(is_partial(refs, it))(lambda: read_copy(refs, it, index).wait())
        merge(refs, it, index)
        write_copy(refs, it, index).start()

    lax.fori_loop(0, count, body, None)

    def drain(index, _):
        write_copy(refs, item(refs, index), index).wait()

    lax.fori_loop(jnp.maximum(count - NUM_GROUPS, 0), count, drain, None)


def write(
    new_kv: jax.Array, kv_pages: jax.Array, layer: jax.Array, schedule: PrefillSchedule, *, interpret: Any = False
) -> jax.Array:
    """The pages [L, P, S, K, C, W] (aliased) with the new rows [T, S, K, W] of `schedule.writes` in layer i32[1]."""
    num_tokens, num_kinds, num_heads, width = new_kv.shape
    size, window, dtype = schedule.blocks.write, window_rows(schedule.blocks), kv_pages.dtype
    padding = padded_tokens(num_tokens, schedule.blocks) - num_tokens
    head_major = jnp.pad(jnp.transpose(new_kv, (1, 2, 0, 3)), ((0, 0), (0, 0), (0, padding), (0, 0)))
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[in_hbm, in_hbm],
            out_specs=in_hbm,
            scratch_shapes=[
                pltpu.VMEM((2, num_kinds, num_heads, window, width), dtype),
                pltpu.VMEM((NUM_GROUPS, num_kinds, num_heads, size, width), dtype),
                pltpu.VMEM((num_kinds, num_heads, width // LANES, 2 * size + window, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((NUM_GROUPS,)),
                pltpu.SemaphoreType.DMA((NUM_GROUPS,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=64 << 20),
        interpret=interpret,
        name="write_new_kv",
    )(schedule.writes, jnp.stack([layer.reshape(()), schedule.counts[1]]), head_major, kv_pages)
