"""What the kernels of Hopper decode share: static facts, refs in global and shared memory, units of work, layouts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.tree_util import register_dataclass

from pallas_kernels.ragged_paged_attention import gpu_schedule as work
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.gpu_schedule import DecodeSchedule

# A score that is not seen, and the maximum before any score: finite, and apart, so that exp2 of their difference is 0
# without a second selection.
NOT_SEEN, NOTHING_SEEN = -1e30, -1e29
MATRIX_ROWS = 64
SLAB_ROWS = 8
# Of 8-bit pages at once: 32 numbers a thread (H 128).
CONVERTED_ROWS = 32
MAX_FLOAT16 = 65504.0
# Of an SM's 228 KB, less 1 KB a block that the system takes and 3 KB for barriers and reductions.
SHARED_MEMORY = 223 << 10
# Of H100 SXM and H200.
NUM_SMS = 132
# More tiles on the way than that bring nothing.
MAX_SLOTS = 6
UNROLLED_COLUMNS = 16
# Columns of partial results that the combining kernel has in flight: 32 registers a thread.
COMBINED_COLUMNS = 64
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
ROWS = plgpu.Layout.WGMMA.reduce(1)


def choose_blocks(spec: AttentionSpec, queries: int, num_rows: int) -> work.DecodeBlocks:
    """The rule where nothing was tuned (`gpu_blocks`).

    Two blocks an SM of 132 (H100 SXM, H200) where registers allow: one computes while the other waits for its tile.

    An SM must have about 40 KB on the way (4.8 TB/s x 1 us / 132); the rings of tiles, 32 KB each for the keys and
    values of 64 tokens (H 128) or 128 (H 64), have 130 to 200 KB.
    """
    columns = work.padded_columns(queries, spec.num_q_heads // spec.num_kv_heads)
    num_pairs = num_rows * spec.num_kv_heads
    most = work.max_splits(num_pairs, 4 * spec.head_dim * columns)
    if spec.interpret:  # few and small: a block takes 70 ms
        return work.DecodeBlocks(64, 2, 2, 64, min(most, 4), 1)
    kv_tokens = 128 if spec.head_dim == 64 and columns <= UNROLLED_COLUMNS else 64
    # Above, a thread has more than the 128 registers that two blocks of 256 leave it.
    blocks_an_sm = 2 if spec.head_dim <= 128 and spec.head_dim * columns <= 128 * 16 else 1
    slots = slots_that_fit(spec, queries, kv_tokens, blocks_an_sm)
    split_tokens = max(work.split_tokens(num_pairs), kv_tokens)
    return work.DecodeBlocks(kv_tokens, slots, NUM_SMS * blocks_an_sm, split_tokens, most, 528)


def slots_that_fit(spec: AttentionSpec, queries: int, kv_tokens: int, blocks_an_sm: int) -> int:
    """`DecodeBlocks.slots` that a block's share of the shared memory holds, MAX_SLOTS at most."""
    columns = work.padded_columns(queries, spec.num_q_heads // spec.num_kv_heads)
    size = jnp.dtype(spec.kv_dtype).itemsize
    converted = 4 * kv_tokens * spec.head_dim if size == 1 else 0
    fixed = 2 * columns * (spec.head_dim + kv_tokens) + converted
    slots = (SHARED_MEMORY // blocks_an_sm - fixed) // (2 * kv_tokens * spec.head_dim * size)
    return min(slots, MAX_SLOTS)


@dataclass(frozen=True)
class Shape:
    """The static facts of a call that the kernel's parts share; letters as in `api`, A columns of a unit."""

    num_tokens: int
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    queries: int
    kv_dtype: Any
    scale: float
    soft_cap: float | None
    blocks: work.DecodeBlocks

    @property
    def columns(self) -> int:
        """A."""
        return work.padded_columns(self.queries, self.group)

    @property
    def unrolled(self) -> bool:
        """Few enough columns to have code for each."""
        return self.columns <= UNROLLED_COLUMNS

    @property
    def spare_registers(self) -> bool:
        return self.unrolled and self.head_dim <= 128

    @property
    def splits(self) -> bool:
        """Whether there are partial results: of rows with several splits, or, with many columns, of all rows: 64 rows
        of H at a time the kernel that combines them needs few registers to write them.
        """
        return self.blocks.max_splits > 1 or not self.unrolled

    @property
    def tile(self) -> int:
        return self.blocks.kv_tokens

    @property
    def copies(self) -> int:
        """TMA boxes of the keys of a tile: whole pages, or one part of a page."""
        return max(1, self.tile // self.page_size)

    @property
    def converted(self) -> bool:
        """8-bit pages go through tiles of `dtype`."""
        return jnp.dtype(self.kv_dtype).itemsize == 1

    @property
    def dtype(self) -> Any:
        """Of both products. The card has one instruction for two e4m3 to float16 and none to bfloat16; queries beyond
        65,504 saturate there.
        """
        return jnp.float16 if jnp.dtype(self.kv_dtype) == jnp.float8_e4m3fn else jnp.bfloat16


@register_dataclass
@dataclass(frozen=True)
class Inputs:
    """Arrays, and in the kernel refs in global memory; None for an option that the call has not."""

    queries: Any  # [T, N, H]
    keys: Any  # [T, K, H], of the pages' dtype
    values: Any
    pages: Any  # Ref of [L, P, 2, K, C, H]
    layer: Any  # i32[1]
    schedule: DecodeSchedule
    sinks: Any  # f32[N]
    window: Any  # i32[1]
    k_scale: Any  # f32[1] or f32[K]
    v_scale: Any


@register_dataclass
@dataclass(frozen=True)
class Memory:
    """Refs in shared memory; k and v are the ring, q [A, H], p [A, tile], and tiles of 8-bit pages in another type."""

    q: Any
    p: Any
    k: Any
    v: Any
    k16: Any
    v16: Any
    ready: Any
    used: Any


@dataclass(frozen=True)
class Unit:
    """A split of an entry for a kv head; traced scalars."""

    entry: Any
    head: Any
    split: Any
    token: Any
    q_len: Any
    kv_len: Any
    splits: Any
    slot: Any
    first_tile: Any
    end_tile: Any


def read_unit(entry, head, split, rows, shape: Shape, window=None) -> Unit:
    """The tiles of a unit are those of its split that a window leaves: maybe none."""
    token, q_len, kv_len, splits, split_tiles, slot = (rows[entry, column] for column in range(6))
    first = split * split_tiles
    end = jnp.minimum(first + split_tiles, lax.div(kv_len + shape.tile - 1, shape.tile))
    if window is not None:
        lowest = jnp.maximum(kv_len - q_len - window[0] + 1, 0)
        first = jnp.maximum(first, jnp.where(window[0] > 0, lax.div(lowest, shape.tile), 0))
    return Unit(entry, head, split, token, q_len, kv_len, splits, slot * shape.num_kv_heads + head * splits + split,
                first, end)  # fmt: skip


def is_partial(unit: Unit, shape: Shape) -> Array:
    return unit.splits > (1 if shape.unrolled else 0)


def for_each_unit(refs: Inputs, shape: Shape, visit: Callable[[Unit, Array], Array]) -> Array:
    """Calls `visit(unit, tiles before it)`, which returns the tiles up to its end, for this block's units in turn."""
    block = lax.axis_index("block")
    entry, head, split, count = (refs.schedule.starts[block, column] for column in range(work.NUM_START_COLUMNS))

    def step(_, state):
        entry, head, split, num_tiles = state
        unit = read_unit(entry, head, split, refs.schedule.rows, shape, refs.window)
        num_tiles = visit(unit, num_tiles)
        next_head = split + 1 == unit.splits
        next_entry = jnp.logical_and(next_head, head + 1 == shape.num_kv_heads)
        split = jnp.where(next_head, 0, split + 1)
        head = jnp.where(next_entry, 0, jnp.where(next_head, head + 1, head))
        return jnp.where(next_entry, entry + 1, entry), head, split, num_tiles

    return lax.fori_loop(0, count, step, (entry, head, split, jnp.int32(0)))[3]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def slab_layout(width: int):
    """8 rows over 128 threads: a warp has 2 rows, a lane a 16th of a row."""
    tiling = plgpu.Tiling(((SLAB_ROWS, width), (2, width), (width // 16,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def column_blocks(shape: Shape) -> list:
    """Of a tile in shared memory: whole swizzled rows."""
    width = min(shape.head_dim, 128 // jnp.dtype(shape.kv_dtype).itemsize)
    return [pl.ds(column, width) for column in range(0, shape.head_dim, width)]


def swizzled(dtype, columns: int) -> tuple:
    """Rows of at most 128 bytes in groups of 8, as wgmma and TMA exchange them."""
    width = min(columns * jnp.dtype(dtype).itemsize, 128)
    tiling = plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]


def scratch(shape: Shape) -> Any:
    """A Memory of types."""
    a, h, tile, slots = shape.columns, shape.head_dim, shape.tile, shape.blocks.slots

    def operand(size: tuple[int, int]):
        return plgpu.SMEM(size, shape.dtype, transforms=swizzled(shape.dtype, size[1]))

    ring = plgpu.SMEM((slots, tile, h), shape.kv_dtype, transforms=swizzled(shape.kv_dtype, h))
    tile16 = operand((tile, h)) if shape.converted else None
    return Memory(
        q=operand((a, h)),
        p=operand((a, tile)),
        k=ring,
        v=ring,
        k16=tile16,
        v16=tile16,
        ready=plgpu.Barrier(num_arrivals=2 * shape.copies, num_barriers=slots),
        used=plgpu.Barrier(num_barriers=slots),
    )


def for_each_slab(shape: Shape, visit: Callable[..., None]) -> None:
    """Calls `visit(first column, columns in use)` for every 8 columns; many of them in a loop, to compile them once."""
    if shape.unrolled:
        for first in range(0, shape.columns, SLAB_ROWS):
            visit(first, min(SLAB_ROWS, shape.queries * shape.group - first))
        return

    @pl.loop(0, shape.columns // SLAB_ROWS)
    def _(i):
        visit(pl.multiple_of(i * SLAB_ROWS, SLAB_ROWS))


def divide(number, divisor: int) -> tuple[Any, Any]:
    """divmod of a static or traced number that is not negative."""
    return divmod(number, divisor) if isinstance(number, int) else (lax.div(number, divisor), lax.rem(number, divisor))


def of_head(scale_ref, head) -> Array:
    return scale_ref[head if scale_ref.shape[0] > 1 else 0]
