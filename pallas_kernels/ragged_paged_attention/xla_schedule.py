"""The work list of the XLA implementation: built once a step, reused by every layer."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import register_dataclass

from pallas_kernels.ragged_paged_attention.contract import AttentionSpec

# Rows with at most this many queries are served W together; 16 covers verification of 15 drafted tokens.
MAX_ROW_FORM_QUERIES = 16


# Added to the packed index of a token that is not written: a page no pool has, another one for every such token, so
# that the scatter may be told its indices are unique.
NO_PAGE = 2**30


@dataclass(frozen=True)
class Tile:
    """Static sizes of a tile: queries, and tokens of context an iteration (cut to whole pages, at least one)."""

    queries: int
    kv: int


@dataclass(frozen=True)
class Blocks:
    """Static sizes of the loops.

    Fields:
      rows: W, rows served together in the row form.
      row_kv: tokens of context an iteration of the row form (cut to whole pages, at least one).
      tiles: of the tile form, largest first.
      row_float32, tile_float32: multiply in float32 (else in the dtype of queries and pages).
    """

    rows: int
    row_kv: int
    row_float32: bool
    tiles: tuple[Tile, ...]
    tile_float32: bool

    @staticmethod
    def choose(platform: str) -> "Blocks":
        if platform == "cpu":
            # Measured with 8/2 heads of 64 and bfloat16 pages. The row form, 64 rows of 16 to 256 tokens: W 8, 16, 32
            # with blocks of 64 take 5.8, 5.0, 4.5 ms for 5 layers, with blocks of 128 5.2, 4.2, 4.7 ms; in bfloat16 a
            # tenth to a fifth more (XLA:CPU gathers bfloat16 slowly, and a few rows do not fill its bfloat16 matmul).
            # The tile form: a prompt of 2048 takes 23 ms a layer in tiles of 256 x 256 and 40 ms in tiles of 64 x 128;
            # a prompt of 64 takes 0.33 ms in a tile of 64 x 128 and 0.53 ms in one of 64 x 256.
            return Blocks(
                rows=16, row_kv=128, row_float32=True, tiles=(Tile(256, 256), Tile(64, 128)), tile_float32=False
            )
        # Not measured. A loop of dynamic length asks the host after each iteration on a GPU: few and large ones.
        return Blocks(rows=64, row_kv=256, row_float32=False, tiles=(Tile(256, 512),), tile_float32=False)


@register_dataclass
@dataclass(frozen=True)
class Items:
    """Units of work, the first `count` in use: up to Q queries of one row.

    Fields:
      tokens: i32[X, Q], packed index of each query (consecutive; may run beyond the item's queries).
      positions: i32[X, Q], the query's position in its row, -1 for none.
      ends: i32[X], one more than the last position, 0 for an unused item.
      pages: i32[X, M'], the row's pages, 0 beyond its length; M' is a whole number of blocks.
      count: i32[].
      kv_block: tokens of context an iteration.
    """

    tokens: Array
    positions: Array
    ends: Array
    pages: Array
    count: Array
    kv_block: int = field(metadata={"static": True})


@register_dataclass
@dataclass(frozen=True)
class Schedule:
    """Work of a step; rows that are inactive or padding are in none of it.

    Fields:
      page, slot: i32[T], where each token's key and value go; the page of a token that goes nowhere is out of range.
      few: the row form's rows, longest first: a chunk of W lasts as long as its longest row.
      few_slot: i32[T], where a token's output lies among the row form's X * Q; X * Q for tokens of no such row.
      many: the tile form's tiles by kind; none in a decode step.
    """

    page: Array
    slot: Array
    few: Items
    few_slot: Array
    many: tuple[Items, ...]
    few_width: int = field(metadata={"static": True})  # W
    blocks: Blocks = field(metadata={"static": True})


@dataclass(frozen=True)
class Rows:
    """The step by rows i32[R + 1]: lengths are 0 for inactive and padding rows and for a null row behind the last."""

    kv_lens: Array
    q_lens: Array
    q_starts: Array
    pages: Array  # i32[R + 1, M']

    def __getitem__(self, rows: Array) -> "Rows":
        return Rows(self.kv_lens[rows], self.q_lens[rows], self.q_starts[rows], self.pages[rows])


def make_schedule(
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    *,
    num_tokens: int,
    spec: AttentionSpec,
    blocks: Blocks | None = None,
) -> Schedule:
    """See `api.make_schedule`; `blocks` is for tests and measurements."""
    blocks = blocks or Blocks.choose(spec.device.platform)
    kv_lens, cu_q_lens = jnp.asarray(kv_lens), jnp.asarray(cu_q_lens)
    row = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    active = (kv_lens > 0) & (row < distribution[2])
    kv_lens = jnp.where(active, kv_lens, 0)
    q_lens = jnp.where(active, cu_q_lens[1:] - cu_q_lens[:-1], 0)
    pages = clean_pages(page_indices, kv_lens, spec.page_size, max(blocks.row_kv, *(tile.kv for tile in blocks.tiles)))
    rows = Rows(*(with_null_row(by_row) for by_row in (kv_lens, q_lens, cu_q_lens[:-1], pages)))

    all_few = spec.max_q_len is not None and spec.max_q_len <= MAX_ROW_FORM_QUERIES
    few_queries = spec.max_q_len or 1 if all_few else 1
    in_few = active if all_few else active & (row < distribution[0])
    width = min(blocks.rows, kv_lens.shape[0])
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.sum(cu_q_lens[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)  # R for padding tokens
    index = token - cu_q_lens[owner]
    page, slot = destinations(rows, owner, index, spec.page_size)
    order = few_order(in_few, kv_lens, width)
    num_few = jnp.sum(in_few, dtype=jnp.int32)
    few = make_items(rows, order, jnp.zeros_like(order), num_few, Tile(few_queries, blocks.row_kv))
    many = () if all_few else many_items(rows, jnp.where(in_few, 0, q_lens), num_tokens, blocks.tiles)
    return Schedule(
        page=page,
        slot=slot,
        few=few,
        few_slot=few_slots(order, in_few, owner, index, few_queries),
        many=many,
        few_width=width,
        blocks=blocks,
    )


def with_null_row(by_row: Array) -> Array:
    return jnp.pad(by_row, [(0, 1)] + [(0, 0)] * (by_row.ndim - 1))


def clean_pages(page_indices, kv_lens: Array, page_size: int, kv_block: int) -> Array:
    """Page table i32[R, M'] with 0 for every entry beyond a row's length, M' a whole number of blocks."""
    num_pages = page_indices.shape[1]
    block_pages = pages_a_block(kv_block, page_size)
    used = jnp.arange(num_pages) * page_size < kv_lens[:, None]
    return jnp.pad(jnp.where(used, page_indices, 0), ((0, 0), (0, -num_pages % block_pages)))


def pages_a_block(kv_block: int, page_size: int) -> int:
    """Whole pages a block of at least one; powers of two, so that the larger block is a multiple of the smaller."""
    return 1 << max(0, (kv_block // page_size).bit_length() - 1)


def few_order(in_few: Array, kv_lens: Array, width: int) -> Array:
    """i32[X]: the rows of the row form, longest first, then null rows up to a multiple of `width`."""
    num_rows = in_few.shape[0]
    order = jnp.argsort(jnp.where(in_few, -kv_lens, 1)).astype(jnp.int32)
    order = jnp.where(in_few[order], order, num_rows)
    return jnp.pad(order, (0, -num_rows % width), constant_values=num_rows)


def many_items(rows: Rows, q_lens: Array, num_tokens: int, tiles: tuple[Tile, ...]) -> tuple[Items, ...]:
    """Items of each kind of tile. A row takes tiles of a kind while they are more than half full, the last kind for the
    rest.
    """
    found = []
    done = jnp.zeros_like(q_lens)
    for tile in tiles:
        size = min(tile.queries, 1 << (num_tokens - 1).bit_length())
        if tile != tiles[-1] and size <= tiles[-1].queries:
            continue
        least = 0 if tile == tiles[-1] else size // 2  # queries that do not yet get a tile
        capacity = num_tokens // size + min(q_lens.shape[0], num_tokens // (least + 1))
        counts = lax.div(q_lens - done + size - 1 - least, size)
        row, index, count = expand(counts, capacity)
        found.append(make_items(rows, row, with_null_row(done)[row] + index * size, count, Tile(size, tile.kv)))
        done = jnp.minimum(q_lens, done + counts * size)
    return tuple(found)


def make_items(rows: Rows, row: Array, first: Array, count: Array, tile: Tile) -> Items:
    """Items of as many queries as the tile has, of `row` i32[X], from its query `first` i32[X] on."""
    mine = rows[row]
    index = first[:, None] + jnp.arange(tile.queries, dtype=jnp.int32)
    begins = mine.kv_lens - mine.q_lens
    positions = jnp.where(index < mine.q_lens[:, None], begins[:, None] + index, -1)
    return Items(mine.q_starts[:, None] + index, positions, positions.max(axis=1) + 1, mine.pages, count, tile.kv)


def expand(counts: Array, size: int) -> tuple[Array, Array, Array]:
    """Lists `counts[r]` entries for each r in turn: (r i32[size], index within r i32[size], total i32[]).

    Entries beyond the total name the row behind the last.
    """
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    entry = jnp.arange(size, dtype=jnp.int32)
    owner = jnp.sum(ends[None, :] <= entry[:, None], axis=1, dtype=jnp.int32)
    begins = jnp.pad(ends - counts, (0, 1))
    return owner, entry - begins[owner], ends[-1]


def few_slots(order: Array, in_few: Array, owner: Array, index: Array, num_queries: int) -> Array:
    """See `Schedule.few_slot`; `owner` and `index` i32[T] are a token's row and its number in the row."""
    item = jnp.zeros(in_few.shape[0] + 1, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    return jnp.where(with_null_row(in_few)[owner], item[owner] * num_queries + index, order.shape[0] * num_queries)


def destinations(rows: Rows, owner: Array, index: Array, page_size: int) -> tuple[Array, Array]:
    """See `Schedule.page` and `Schedule.slot`."""
    position = rows.kv_lens[owner] - rows.q_lens[owner] + index
    page = rows.pages.at[owner, lax.div(position, page_size)].get(mode="clip")
    nowhere = NO_PAGE + jnp.arange(owner.shape[0], dtype=jnp.int32)
    return jnp.where(index < rows.q_lens[owner], page, nowhere), lax.rem(position, page_size)
