"""The work list of the Hopper decode kernel: built once a step by XLA, reused by every layer.

The unit of work is one split of one row's context for one kv head. How a row is split follows from its own length and
from static sizes alone, so that its bytes do not depend on the other rows; which block of threads computes a unit
follows from all lengths, so that every block gets the same share of tiles.
"""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import register_dataclass

# Columns of `DecodeSchedule.rows`.
TOKEN, Q_LEN, KV_LEN, SPLITS, SPLIT_TILES, SLOT, NUM_ROW_COLUMNS = 0, 1, 2, 3, 4, 5, 8
# Columns of `DecodeSchedule.starts`.
ENTRY, HEAD, SPLIT, COUNT, NUM_START_COLUMNS = 0, 1, 2, 3, 4
# N of a wgmma instruction is a multiple of 8: columns of the matrices that a unit multiplies.
COLUMN_ALIGNMENT = 8
# By head width. With more, accumulator, scores and probabilities do not fit the 255 registers of a thread.
MAX_COLUMNS = {64: 48, 128: 48, 256: 16}
# Tiles that starting and ending a unit is worth when blocks get their shares: reading its queries, writing its result.
UNIT_COST = 1
MAX_SPLITS = 32
MAX_PARTIAL_BYTES = 64 << 20
MIN_SPLIT_TOKENS, MAX_SPLIT_TOKENS = 64, 2048


@dataclass(frozen=True)
class DecodeBlocks:
    """Static sizes of the decode kernel.

    Fields:
      kv_tokens: keys and values of a tile, a multiple of 64.
      slots: tiles of keys, and as many of values, in shared memory.
      num_blocks: persistent blocks of threads on the card.
      split_tokens: context from which on a row is split; splits are never shorter.
      max_splits: of a row.
      combine_blocks: at most so many blocks of the kernel that combines splits.
    """

    kv_tokens: int
    slots: int
    num_blocks: int
    split_tokens: int
    max_splits: int
    combine_blocks: int


@register_dataclass
@dataclass(frozen=True)
class DecodeSchedule:
    """Work of a step. E = R entries, the rows that the decode kernel serves first.

    Fields:
      rows: i32[E, 8]. Of an entry: its first packed token, number of queries, kv length, number of splits (0 for an
        entry not in use), tiles a split, and where the partial results of its splits begin (in units of K).
      starts: i32[B, 4]. Of a block of threads: entry, kv head and split of its first unit, and how many units it
        computes. Units are ordered by entry, kv head, split.
      table: i32[E, M'], the entry's pages, beyond its length its last page; M' is a whole number of tiles.
      silent: i32[T], 1 for a token whose output is zero: of an inactive or padding row, or of no row.
    """

    rows: Array
    starts: Array
    table: Array
    silent: Array
    queries: int = field(metadata={"static": True})
    blocks: DecodeBlocks = field(metadata={"static": True})


def padded_columns(queries: int, group: int) -> int:
    """Columns of a unit: one for each query head of each query, padded."""
    return -(-queries * group // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def max_queries(group: int, head_dim: int) -> int:
    """Most queries of a row that the decode kernel can serve."""
    return MAX_COLUMNS.get(head_dim, 0) // group


def queries_a_row(group: int, head_dim: int, max_q_len: int | None) -> int:
    """Q, the most queries of a row that the decode kernel serves in a call; 0 where not even one fits."""
    most = max_queries(group, head_dim)
    return max_q_len if max_q_len is not None and max_q_len <= most else min(most, 1)


def split_tokens(num_pairs: int) -> int:
    """Shortest split, from the number of pairs of row and kv head.

    One row of 8 heads: 64, so that a context of 1,024 is 128 units for 132 SMs. 32 rows: 512, so that a context of
    4,096 is 2,048 units, of which a block of threads gets 8, and its partial results are 1.6 % of what it reads (4 KiB
    of 256 KiB, H 128). The square root between them shares the growth between the two.
    """
    exponent = (num_pairs.bit_length() - 1) // 2
    return min(MAX_SPLIT_TOKENS, max(MIN_SPLIT_TOKENS, 32 << exponent))


def max_splits(num_pairs: int, partial_bytes: int) -> int:
    """Most splits of a row: the partial results of all stay below `MAX_PARTIAL_BYTES`."""
    return max(1, min(MAX_SPLITS, MAX_PARTIAL_BYTES // (num_pairs * partial_bytes)))


def for_rows_up_to(longest: int, blocks: DecodeBlocks) -> DecodeBlocks:
    """No more splits than rows of `longest` tokens have: partial results have memory for as many."""
    return replace(blocks, max_splits=min(blocks.max_splits, -(-longest // blocks.split_tokens)))


def make_decode_schedule(
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    *,
    num_tokens: int,
    num_kv_heads: int,
    page_size: int,
    queries: int,
    all_rows: bool,
    blocks: DecodeBlocks,
) -> DecodeSchedule:
    """The units of the rows [0, distribution[2]), or with `all_rows` False of those with one query."""
    blocks = for_rows_up_to(page_indices.shape[1] * page_size, blocks)
    kv_lens, cu_q_lens = jnp.asarray(kv_lens), jnp.asarray(cu_q_lens)
    row = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    active = (kv_lens > 0) & (row < distribution[2])
    mine = active & (row < distribution[2 if all_rows else 0])
    order = jnp.argsort(~mine, stable=True)
    kv_lens = jnp.where(mine, kv_lens, 0)[order]
    q_lens = jnp.where(mine, cu_q_lens[1:] - cu_q_lens[:-1], 0)[order]
    tiles = lax.div(kv_lens + blocks.kv_tokens - 1, blocks.kv_tokens)
    splits, split_tiles = split_rows(kv_lens, tiles, blocks)
    slots = jnp.cumsum(splits) - splits
    fields = [cu_q_lens[:-1][order], q_lens, kv_lens, splits, split_tiles, slots]
    fields += [jnp.zeros_like(kv_lens)] * (NUM_ROW_COLUMNS - len(fields))
    return DecodeSchedule(
        rows=jnp.stack(fields, axis=1).astype(jnp.int32),
        starts=first_units(tiles, splits, split_tiles, num_kv_heads, blocks.num_blocks),
        table=clean_table(page_indices[order], kv_lens, page_size, blocks.kv_tokens),
        silent=silent_tokens(active, cu_q_lens, num_tokens),
        queries=queries,
        blocks=blocks,
    )


def split_rows(kv_lens: Array, tiles: Array, blocks: DecodeBlocks) -> tuple[Array, Array]:
    """(splits, tiles a split) i32[E], from each row's own length: as many splits as are allowed, of about one size."""
    wanted = jnp.clip(lax.div(kv_lens + blocks.split_tokens - 1, blocks.split_tokens), 1, blocks.max_splits)
    split_tiles = jnp.maximum(lax.div(tiles + wanted - 1, wanted), 1)
    return lax.div(tiles + split_tiles - 1, split_tiles), split_tiles


def first_units(tiles: Array, splits: Array, split_tiles: Array, num_kv_heads: int, num_blocks: int) -> Array:
    """`DecodeSchedule.starts`: block b begins with the unit in which the share b / B of all tiles begins."""
    head_cost = tiles + UNIT_COST * splits
    row_cost = head_cost * num_kv_heads
    ends = jnp.cumsum(row_cost)
    total = ends[-1]
    block = jnp.arange(num_blocks + 1, dtype=jnp.int32)
    begin = lax.div(total, num_blocks) * block + jnp.minimum(block, lax.rem(total, num_blocks))
    entry = jnp.minimum(jnp.sum(ends[None, :] <= begin[:, None], axis=1, dtype=jnp.int32), tiles.shape[0] - 1)
    rest = begin - (ends - row_cost)[entry]
    cost = jnp.maximum(head_cost[entry], 1)
    head = lax.div(rest, cost)
    split = lax.div(lax.rem(rest, cost), jnp.maximum(split_tiles[entry] + UNIT_COST, 1))
    units = splits * num_kv_heads
    at_end = begin >= total
    index = (jnp.cumsum(units) - units)[entry] + head * splits[entry] + split
    index = jnp.where(at_end, jnp.sum(units), index)
    counts = index[1:] - index[:-1]
    starts = [jnp.where(at_end, 0, field)[:-1] for field in (entry, head, split)]
    return jnp.stack([*starts, counts], axis=1).astype(jnp.int32)


def clean_table(page_indices: Array, kv_lens: Array, page_size: int, kv_tokens: int) -> Array:
    """`DecodeSchedule.table`: a tile at the end of a row brings the row's last page again instead of a foreign one."""
    num_pages = page_indices.shape[1]
    page = jnp.arange(num_pages + -num_pages % max(1, kv_tokens // page_size), dtype=jnp.int32)
    last = jnp.maximum(lax.div(kv_lens + page_size - 1, page_size) - 1, 0)
    table = jnp.take_along_axis(page_indices, jnp.minimum(page[None], last[:, None]), axis=1)
    return jnp.where((kv_lens > 0)[:, None], table, 0).astype(jnp.int32)


def silent_tokens(active: Array, cu_q_lens: Array, num_tokens: int) -> Array:
    """`DecodeSchedule.silent`."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.sum(cu_q_lens[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
    return (~jnp.pad(active, (0, 1))[owner]).astype(jnp.int32)
