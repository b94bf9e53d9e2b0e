"""The work list of the Hopper prefill kernel: built once a step by XLA, reused by every layer.

A tile of queries is 2 x Q consecutive packed tokens of one row (Q a compute warpgroup), times the query heads that its
64 matrix rows hold besides. Tiles start at a multiple of 8 packed tokens, whatever the row's own start: a TMA box into
swizzled shared memory moves whole groups of 8. What a tile holds of other rows is computed and dropped.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

# Tokens of a packed step must be a multiple of it: rows of a swizzled tile.
TOKEN_ALIGNMENT = 8
# M of a wgmma instruction: matrix rows of a warpgroup.
MATRIX_ROWS = 64
NUM_COMPUTE_WARPGROUPS = 2
# Columns of `Schedule.items`.
ROW, TOKEN, FIRST, END, POSITION, KV_LEN, ZERO = 0, 1, 2, 3, 4, 5, 6


@register_dataclass
@dataclass(frozen=True)
class PrefillSchedule:
    """Work of a step, longest first: neighbouring blocks take tiles of about one cost.

    Fields:
      items: i32[X, 8], the first `count` in use. Of a tile: its row, its first packed token (a multiple of 8), the
        first packed token that is the tile's own and one more than the last, the position in the row of the tile's
        first packed token (negative where that belongs to the row before), the row's kv length, 0, 0.
      count: i32[1].
      destinations: i32[T], page * C + slot of the token's key and value, -1 for tokens not written here.
    """

    items: Array
    count: Array
    destinations: Array


def heads_a_warpgroup(group: int) -> int:
    """Query heads of one kv head that share a warpgroup's 64 rows: the largest power of two in the group, at most 8.

    So 64 rows are always full (8 tokens of 8 heads .. 64 tokens of one head) and groups of 8 rows are 8 consecutive
    tokens of one head, which a TMA box needs.
    """
    return min(group & -group, MATRIX_ROWS // TOKEN_ALIGNMENT)


def queries_a_tile(group: int) -> int:
    return NUM_COMPUTE_WARPGROUPS * MATRIX_ROWS // heads_a_warpgroup(group)


def padded_tokens(num_tokens: int, group: int) -> int:
    """Tokens that the kernel's queries and outputs must have: whole groups of 8, and one tile at least."""
    return max(-(-num_tokens // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT, queries_a_tile(group))


def make_prefill_schedule(
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    *,
    num_tokens: int,
    group: int,
    page_size: int,
    first_row_class: int = 2,
) -> PrefillSchedule:
    """The tiles of the rows [distribution[first_row_class - 1] (0 for class 0), distribution[2]).

    Args: arrays as `api.make_schedule`; group is G = N / K; first_row_class 0 takes rows of one query too, 1 rows of a
      few queries and of many, 2 those of many.
    """
    row = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    first_row = jnp.asarray(distribution)[first_row_class - 1] if first_row_class else 0
    mine = (row >= first_row) & (row < distribution[2]) & (kv_lens > 0)
    starts = jnp.asarray(cu_q_lens)[:-1]
    q_lens = jnp.where(mine, cu_q_lens[1:] - starts, 0)
    items, count = query_tiles(kv_lens, starts, q_lens, num_tokens, group)
    return PrefillSchedule(
        items=items,
        count=count[None],
        destinations=destinations(kv_lens, page_indices, cu_q_lens, q_lens, num_tokens, page_size),
    )


def query_tiles(kv_lens: Array, starts: Array, q_lens: Array, num_tokens: int, group: int) -> tuple[Array, Array]:
    """(items i32[X, 8], count i32[]) of `PrefillSchedule`."""
    size = queries_a_tile(group)
    num_rows = kv_lens.shape[0]
    aligned = starts - starts % TOKEN_ALIGNMENT
    counts = jnp.where(q_lens > 0, (starts + q_lens - aligned + size - 1) // size, 0)
    capacity = max(1, min(num_tokens, (num_tokens + (TOKEN_ALIGNMENT - 1) * num_rows) // size + num_rows))
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    begin = aligned[row] + (item - (ends - counts)[row]) * size
    # The last tile of the step is moved forward so that it ends inside the queries; it still owns only its own tokens.
    token = jnp.minimum(begin, padded_tokens(num_tokens, group) - size)
    first = jnp.maximum(begin, starts[row])
    end = jnp.minimum(begin + size, starts[row] + q_lens[row])
    position = kv_lens[row] - q_lens[row] + token - starts[row]
    zero = jnp.zeros_like(row)
    items = jnp.stack([row, token, first, end, position, kv_lens[row], zero, zero], axis=1)
    cost = jnp.where(item < ends[-1], position + end - token, -1)
    return items[jnp.argsort(-cost)].astype(jnp.int32), ends[-1]


def destinations(
    kv_lens: Array, page_indices: Array, cu_q_lens: Array, q_lens: Array, num_tokens: int, page_size: int
) -> Array:
    """See `PrefillSchedule.destinations`; q_lens i32[R] are 0 for rows that are not written."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.sum(jnp.asarray(cu_q_lens)[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
    inside = owner < kv_lens.shape[0]
    owner = jnp.minimum(owner, kv_lens.shape[0] - 1)
    index = token - jnp.asarray(cu_q_lens)[owner]
    written = inside & (index < q_lens[owner])
    position = jnp.where(written, kv_lens[owner] - q_lens[owner] + index, 0)
    page = jnp.asarray(page_indices)[owner, position // page_size]
    return jnp.where(written, page * page_size + position % page_size, -1)
