"""What the parts of the Hopper prefill kernel share: static facts, refs, and the units of work a block walks over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.ragged_paged_attention import gpu_prefill_schedule as tiles
from pallas_kernels.ragged_paged_attention.gpu_prefill_schedule import MATRIX_ROWS
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled

# Columns of bfloat16 in a swizzled row of shared memory, 128 bytes.
TILE_COLUMNS = 64
# Columns of a unit's values where products are added to the accumulator: twice 128 columns of float32 fit the registers
# of a thread, 256 beside a product do not. So at H 256 a unit is half of a head's values, and its scores are multiplied
# for either half: 1.5 times the products. Whole heads, with products of 128 or 64 columns, spilled 28 to 660 bytes.
ADDED_COLUMNS = 128
# Pallas' interpreter takes its time for every block, with and without work.
INTERPRETED_BLOCKS = 2


@dataclass(frozen=True)
class PrefillBlocks:
    """Static sizes of the kernel.

    Fields:
      kv_tokens: keys and values of a tile, a multiple of 64.
      slots: tiles of keys, and as many of values, in shared memory.
      query_slots: tiles of queries in shared memory; with 2 the next unit's queries come while this one ends.
      num_blocks: persistent blocks, one an SM (132 on H100 SXM, H200 and GH200).
      register_operands: probabilities and accumulator stay in registers; the interpreter cannot run it.
    """

    kv_tokens: int = 128
    slots: int = 2
    query_slots: int = 2
    num_blocks: int = 132
    register_operands: bool = False

    @staticmethod
    def choose(
        head_dim: int, kv_dtype: Any = jnp.bfloat16, register_operands: bool = False, interpret: bool = False
    ) -> "PrefillBlocks":
        """The rule where nothing was tuned (`gpu_blocks`): what fits 227 KB of shared memory and the registers, 8-bit
        tiles beside the bfloat16 they become.
        """
        narrow = head_dim <= 128
        num_blocks = INTERPRETED_BLOCKS if interpret else PrefillBlocks.num_blocks
        if is_scaled(kv_dtype):
            slots = 2 if narrow or not register_operands else 1
            return PrefillBlocks(64, slots, 2 if narrow else 1, num_blocks, register_operands)
        query_slots = 2 if narrow and register_operands else 1
        return PrefillBlocks(128 if narrow else 64, 2, query_slots, num_blocks, register_operands)

    def columns(self, head_dim: int) -> int:
        """Of the values and outputs of a unit: all of H, or a part."""
        return head_dim if self.register_operands else min(head_dim, ADDED_COLUMNS)

    def shared_bytes(self, head_dim: int, kv_dtype: Any) -> int:
        """Of `gpu_prefill.scratch_types`, barriers left out."""
        rows = tiles.NUM_COMPUTE_WARPGROUPS * MATRIX_ROWS
        tile = self.kv_tokens * (head_dim + self.columns(head_dim))
        probabilities = 0 if self.register_operands else rows * self.kv_tokens
        numbers = self.query_slots * rows * head_dim + self.slots * tile + rows * TILE_COLUMNS + probabilities
        return 2 * numbers + (tile if is_scaled(kv_dtype) else 0)


@dataclass(frozen=True)
class Shape:
    """The static facts of a call that the kernel's parts share; letters as in `api`, BQ tokens a warpgroup."""

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    scale: float
    soft_cap: float | None
    sinks: bool
    window: bool
    kv_dtype: Any
    blocks: PrefillBlocks

    @property
    def heads(self) -> int:
        return tiles.heads_a_warpgroup(self.group)

    @property
    def queries(self) -> int:
        """BQ."""
        return MATRIX_ROWS // self.heads

    @property
    def units_a_tile(self) -> int:
        return self.num_kv_heads * self.group // self.heads * self.parts

    @property
    def pages_a_tile(self) -> int:
        """TMA boxes a tile of keys: whole pages, or a part of one."""
        return max(1, self.blocks.kv_tokens // self.page_size)

    @property
    def box_tokens(self) -> int:
        return min(self.blocks.kv_tokens, self.page_size)

    @property
    def columns(self) -> int:
        """See `PrefillBlocks.columns`."""
        return self.blocks.columns(self.head_dim)

    @property
    def converts(self) -> bool:
        """Whether tiles of 8-bit pages become bfloat16 on their way."""
        return is_scaled(self.kv_dtype)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes and of one that copies: 504 for the three warpgroups (65,536 / 128, less 8)."""
        if not self.converts:
            return 232, 40
        return (208, 88) if self.blocks.register_operands else (200, 104)

    @property
    def parts(self) -> int:
        return self.head_dim // self.columns


@dataclass(frozen=True)
class Inputs:
    """Refs in global memory.

    Scales f32[K] have `gpu_softmax.score_factor` folded in. Sinks f32[N / heads, 64] have log2(e) in them and one
    for each matrix row of a unit. Columns i32[S] are 0 .. S - 1 (see `gpu_prefill_compute.mask`).
    """

    queries: Any
    pages: Any
    items: Any
    count: Any
    table: Any
    layer: Any
    window: Any
    score_scale: Any
    output_scale: Any
    sinks: Any
    columns: Any


@dataclass(frozen=True)
class Shared:
    """Scratch of a block: SMEM tiles and barriers (`full`: data is there, `used`: both warpgroups are done).

    p is None where probabilities stay in registers, raw_* (tiles of 8-bit pages) where pages are bfloat16.
    """

    q: Any
    k: Any
    v: Any
    p: Any
    raw_k: Any
    raw_v: Any
    raw_k_full: Any
    raw_v_full: Any
    edge: Any
    q_full: Any
    q_used: Any
    k_full: Any
    k_used: Any
    v_full: Any
    v_used: Any


@dataclass(frozen=True)
class Unit:
    """One unit of work, scalars i32[].

    Fields:
      row: of the step. kv_head: of the pages. head: the first query head. column: the first of H.
      token: first packed token of the tile; first, end: packed tokens that are the tile's own.
      position: of `token` in the row, may be negative; kv_len: of the row.
      first_tile, end_tile: tiles of keys that any of its tokens sees.
      zero: 0, which the compiler does not know. Added to a slot it keeps addresses that only the end of a unit needs
        from being computed before the first and held in registers: 80 of them at H 256.
    """

    row: Array
    kv_head: Array
    head: Array
    column: Any
    token: Array
    first: Array
    end: Array
    position: Array
    kv_len: Array
    first_tile: Array
    end_tile: Array
    zero: Array

    @property
    def first_position(self) -> Array:
        return self.position + self.first - self.token

    @property
    def end_position(self) -> Array:
        return self.position + self.end - self.token


def for_each_unit(shape: Shape, inputs: Inputs, act: Callable[[Array, Unit, Array], Array]) -> tuple[Array, Array]:
    """Runs `act(how many before, unit, tiles before)`, which returns the tiles so far, for the units of this block.

    Units are sorted, longest first; blocks take them forth and back (0 .. B - 1, B - 1 .. 0, ..), which levels the
    load where costs fall steadily. Returns the number of units and of tiles.
    """
    block, num_blocks = lax.axis_index("block"), shape.blocks.num_blocks
    num_units = inputs.count[0] * shape.units_a_tile
    rounds, rest = lax.div(num_units, num_blocks), lax.rem(num_units, num_blocks)

    def place(turn: Array) -> Array:
        return jnp.where(lax.rem(turn, 2) == 0, block, num_blocks - 1 - block)

    def step(turn: Array, tiles_before: Array) -> Array:
        return act(turn, read_unit(shape, inputs, turn * num_blocks + place(turn)), tiles_before)

    num_turns = rounds + (place(rounds) < rest).astype(jnp.int32)
    return num_turns, lax.fori_loop(0, num_turns, step, jnp.int32(0))


def read_unit(shape: Shape, inputs: Inputs, index: Array) -> Unit:
    item, part = lax.div(index, shape.units_a_tile), lax.rem(index, shape.units_a_tile)
    column: Any = 0
    if shape.parts > 1:
        column = pl.multiple_of(lax.rem(part, shape.parts) * shape.columns, shape.columns)
        part = lax.div(part, shape.parts)
    names = (tiles.ROW, tiles.TOKEN, tiles.FIRST, tiles.END, tiles.POSITION, tiles.KV_LEN, tiles.ZERO)
    row, token, first, end, position, kv_len, zero = (inputs.items[item, column] for column in names)
    seen_from = jnp.int32(0)
    if shape.window:
        window = inputs.window[0]
        lowest = jnp.maximum(position + first - token - window + 1, 0)
        seen_from = jnp.where(window > 0, lowest, 0)
    kv_tokens = shape.blocks.kv_tokens
    return Unit(
        row=row,
        kv_head=lax.div(part * shape.heads, shape.group),
        head=part * shape.heads,
        column=column,
        token=pl.multiple_of(token, tiles.TOKEN_ALIGNMENT),
        first=first,
        end=end,
        position=position,
        kv_len=kv_len,
        first_tile=lax.div(seen_from, kv_tokens),
        end_tile=lax.div(position + end - token + kv_tokens - 1, kv_tokens),
        zero=zero,
    )


def has_tail(shape: Shape, unit: Unit) -> Array:
    """Whether the last tile holds slots beyond the row, whose values may be NaN."""
    return unit.end_tile * shape.blocks.kv_tokens > unit.kv_len


def query_box(shape: Shape, unit: Unit, warpgroup: Any, head: int) -> tuple[Any, Array]:
    """Where a warpgroup's tokens of one head lie in queries and outputs [T, N, H]."""
    start = pl.multiple_of(unit.token + warpgroup * shape.queries, tiles.TOKEN_ALIGNMENT)
    return pl.ds(start, shape.queries), unit.head + head
