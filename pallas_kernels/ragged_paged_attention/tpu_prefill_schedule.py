"""The work of the TPU kernels for rows with more than one query: built once a step, reused by every layer."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import register_dataclass

from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import (
    QUERY_ROWS,
    WINDOW_ROWS,
    PrefillBlocks,
    is_few,
)

# Lanes of a vector register: the page table is copied to scalar memory in whole lines of so many.
LANES = 128
ITEM_FIELDS = 5
WRITE_FIELDS = 6


@register_dataclass
@dataclass(frozen=True)
class PrefillSchedule:
    """Work of a step; rows that are inactive, padding or not served are in none of it.

    Fields:
      items: i32[X * ITEM_FIELDS], a unit of attention each: row, first packed token of its tile (a multiple of
        QUERY_ROWS; the row's number where items are rows), first and end index of its own queries in the tile, position
        that the tile's index 0 would have in the row. In row order.
      writes: i32[X' * WRITE_FIELDS], an aligned group of slots of a page each: page, first slot, first and end index of
        the slots that are written, first new token of the window that is read, index of slot 0 in it (may be outside).
      counts: i32[2], items and writes in use.
      pages: i32[R, 1, M'], the rows' pages, beyond a row's length its last one; M' in whole lines.
      tokens: i32[R * queries], the packed token of each query where items are rows, else None.
      places: i32[T], the inverse of `tokens`; R * queries for tokens that are not served.
      served: bool[T], whether a token is in any item.
      blocks: static sizes.
    """

    items: Array
    writes: Array
    counts: Array
    pages: Array
    tokens: Array | None
    places: Array | None
    served: Array
    blocks: PrefillBlocks = field(metadata={"static": True})


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def window_rows(blocks: PrefillBlocks) -> int:
    """New tokens that are read to write a group: it, shifted by less than a packed tile of the narrowest dtype."""
    return round_up(blocks.write, WINDOW_ROWS) + WINDOW_ROWS


def padded_tokens(num_tokens: int, blocks: PrefillBlocks) -> int:
    """Tokens of the head-major arrays: whole tiles of the narrowest dtype, at least an item and a window."""
    return round_up(max(num_tokens, blocks.queries, window_rows(blocks)), WINDOW_ROWS)


def make_prefill_schedule(
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    num_tokens: int,
    spec: AttentionSpec,
    blocks: PrefillBlocks,
) -> PrefillSchedule:
    """Arrays as in `api.make_schedule`. With `spec.max_q_len` all rows are served, without it those from
    `distribution[0]` on.
    """
    kv_lens, cu_q_lens = jnp.asarray(kv_lens, jnp.int32), jnp.asarray(cu_q_lens, jnp.int32)
    row = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    first = 0 if spec.max_q_len is not None else distribution[0]
    served = (kv_lens > 0) & (row >= first) & (row < distribution[2])
    kv_lens = jnp.where(served, kv_lens, 0)
    q_lens = jnp.where(served, cu_q_lens[1:] - cu_q_lens[:-1], 0)
    starts = cu_q_lens[:-1]
    pages = last_page_beyond(jnp.asarray(page_indices, jnp.int32), kv_lens, spec.page_size)
    tokens, places = None, None
    if is_few(spec.max_q_len):
        items, num_items = row_items(kv_lens, q_lens)
        tokens, places = row_places(starts, q_lens, num_tokens, blocks.queries)
    else:
        items, num_items = tile_items(kv_lens, q_lens, starts, num_tokens, blocks)
    writes, num_writes = write_items(kv_lens, q_lens, starts, pages, num_tokens, spec.page_size, blocks)
    counts = jnp.stack([num_items, num_writes])
    pages = jnp.pad(pages, ((0, 0), (0, -pages.shape[1] % LANES)))[:, None]
    served = served_tokens(starts, q_lens, num_tokens)
    return PrefillSchedule(items, writes, counts, pages, tokens, places, served, blocks)


def served_tokens(starts: Array, q_lens: Array, num_tokens: int) -> Array:
    """See `PrefillSchedule.served`."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    return jnp.any((token >= starts) & (token < starts + q_lens), axis=1)


def last_page_beyond(page_indices: Array, kv_lens: Array, page_size: int) -> Array:
    """i32[R, M] with a row's last page in every entry beyond its length (0 for rows without one)."""
    used = jnp.arange(page_indices.shape[1]) * page_size < kv_lens[:, None]
    last = jnp.maximum(lax.div(kv_lens - 1, page_size), 0)
    beyond = jnp.where(kv_lens > 0, jnp.take_along_axis(page_indices, last[:, None], axis=1)[:, 0], 0)
    return jnp.where(used, page_indices, beyond[:, None])


def expand(counts: Array, size: int) -> tuple[Array, Array, Array]:
    """Lists `counts[r]` entries for each r in turn: (r i32[size], index within r i32[size], total i32[]).

    Entries beyond the total name the last r.
    """
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    entry = jnp.arange(size, dtype=jnp.int32)
    owner = jnp.sum(ends[None, :] <= entry[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, counts.shape[0] - 1)
    return owner, entry - (ends - counts)[owner], ends[-1]


def flat(*fields: Array) -> Array:
    return jnp.stack(fields, axis=1).reshape(-1).astype(jnp.int32)


def row_items(kv_lens: Array, q_lens: Array) -> tuple[Array, Array]:
    """Items that are whole rows."""
    row, _, count = expand((q_lens > 0).astype(jnp.int32), kv_lens.shape[0])
    return flat(row, row, jnp.zeros_like(row), q_lens[row], (kv_lens - q_lens)[row]), count


def row_places(starts: Array, q_lens: Array, num_tokens: int, queries: int) -> tuple[Array, Array]:
    """See `PrefillSchedule.tokens` and `places`."""
    index = jnp.arange(queries, dtype=jnp.int32)
    tokens = starts[:, None] + index
    num_places = tokens.size
    own = index < q_lens[:, None]
    place = jnp.arange(num_places, dtype=jnp.int32)
    places = jnp.full(num_tokens, num_places, jnp.int32)
    places = places.at[jnp.where(own, tokens, num_tokens).reshape(-1)].set(place, mode="drop")
    return jnp.minimum(tokens, num_tokens - 1).reshape(-1), places


def tile_items(kv_lens, q_lens, starts, num_tokens: int, blocks: PrefillBlocks) -> tuple[Array, Array]:
    """Items that are aligned tiles of packed tokens; at a row's ends they hold tokens of its neighbours too."""
    size, num_rows = blocks.queries, kv_lens.shape[0]
    aligned = starts // QUERY_ROWS * QUERY_ROWS
    counts = jnp.where(q_lens > 0, (starts + q_lens - aligned + size - 1) // size, 0)
    capacity = min(num_tokens, -(-(num_tokens + (QUERY_ROWS - 1) * num_rows) // size) + num_rows)
    row, index, count = expand(counts, capacity)
    begin = aligned[row] + index * size
    start = jnp.minimum(begin, padded_tokens(num_tokens, blocks) - size)
    low = jnp.maximum(starts[row], begin) - start
    high = jnp.minimum(starts[row] + q_lens[row], begin + size) - start
    return flat(row, start, low, high, (kv_lens - q_lens)[row] + start - starts[row]), count


def write_items(
    kv_lens, q_lens, starts, pages, num_tokens: int, page_size: int, blocks: PrefillBlocks
) -> tuple[Array, Array]:
    """Every aligned group of slots that a new token goes to; see `PrefillSchedule.writes`."""
    size = blocks.write
    begins = kv_lens - q_lens
    group = begins // size
    counts = jnp.where(q_lens > 0, (kv_lens + size - 1) // size - group, 0)
    capacity = min(num_tokens, num_tokens // size + 2 * kv_lens.shape[0])
    row, index, count = expand(counts, capacity)
    position = (group[row] + index) * size
    page = jnp.take_along_axis(pages[row], lax.div(position, page_size)[:, None], axis=1, mode="clip")[:, 0]
    low = jnp.maximum(begins[row] - position, 0)
    high = jnp.minimum(kv_lens[row] - position, size)
    source = starts[row] + position - begins[row]
    last_window = padded_tokens(num_tokens, blocks) - window_rows(blocks)
    window = jnp.clip(source // WINDOW_ROWS * WINDOW_ROWS, 0, last_window)
    return flat(page, lax.rem(position, page_size), low, high, window, source - window), count
