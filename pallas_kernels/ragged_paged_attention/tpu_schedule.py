"""The work list of the TPU kernels: built once a step by XLA, reused by every layer.

Rows in use come first and the longest first, so that the cores of a chip which share a kernel get equal work when they
take rows in turn. The page table stays in HBM and reaches a kernel in chunks of PAGES_A_CHUNK entries: its size is not
limited by scalar memory (1 MiB), which holds four numbers a row only.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import register_dataclass

from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import PrefillBlocks, prefill_blocks
from pallas_kernels.ragged_paged_attention.tpu_prefill_schedule import PrefillSchedule, make_prefill_schedule

# The smallest piece of a row of the table that a copy may move: a lane tile of 128 x i32.
PAGES_A_CHUNK = 128


@dataclass(frozen=True)
class ScalarLayout:
    """Where the kernel finds what in `DecodeRows.scalars`: counts, four numbers a row and one row of zeros more, the
    idle tokens.
    """

    num_rows: int
    num_busy: int = 0
    num_idle: int = 1

    @property
    def row(self) -> int:
        return 2

    @property
    def token(self) -> int:
        return self.row + self.num_rows + 1

    @property
    def kv_len(self) -> int:
        return self.token + self.num_rows + 1

    @property
    def last_page(self) -> int:
        return self.kv_len + self.num_rows + 1

    @property
    def idle(self) -> int:
        return self.last_page + self.num_rows + 1


@register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """Rows with exactly one query.

    Fields:
      scalars: i32[6 + 4 * R + I], see `ScalarLayout`: the numbers of rows in use and of idle tokens; of the rows in use
        their place in `table`, the packed index of their query, their length and the page their new token goes to; then
        the tokens (I of them, T in a decode step and else 0) that no row in use owns. The length is 0 behind the rows
        in use.
      table: i32[R, M', 1, PAGES_A_CHUNK], pages of the rows in their given order; 0 beyond a row's length, never
        negative.
    """

    scalars: Array
    table: Array


@register_dataclass
@dataclass(frozen=True)
class Schedule:
    """`decode`: rows of one query, None where `max_q_len` is larger; `many`: all others, None in a decode step."""

    decode: DecodeRows | None
    many: PrefillSchedule | None


def make_schedule(
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    *,
    num_tokens: int,
    spec: AttentionSpec,
    blocks: PrefillBlocks | None = None,
) -> Schedule:
    """See `api.make_schedule`; `blocks` is for measurements."""
    kv_lens, page_indices, cu_q_lens = (jnp.asarray(x, jnp.int32) for x in (kv_lens, page_indices, cu_q_lens))
    row = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    many = None
    if spec.max_q_len != 1:
        blocks = blocks or prefill_blocks(spec)
        many = make_prefill_schedule(kv_lens, page_indices, cu_q_lens, distribution, num_tokens, spec, blocks)
    if spec.max_q_len not in (1, None):
        return Schedule(None, many)
    end = jnp.asarray(distribution)[2 if spec.max_q_len == 1 else 0]
    kv_lens = jnp.where(row < end, jnp.maximum(kv_lens, 0), 0)
    idle = idle_tokens(kv_lens, cu_q_lens, num_tokens) if spec.max_q_len == 1 else (jnp.int32(0),)
    return Schedule(decode_rows(kv_lens, page_indices, cu_q_lens, idle, spec.page_size), many)


def idle_tokens(kv_lens: Array, cu_q_lens: Array, num_tokens: int) -> tuple[Array, Array]:
    """(how many i32[], which i32[T]) of the tokens that no row of one query and of non-zero length owns."""
    busy = jnp.zeros(num_tokens, bool).at[jnp.where(kv_lens > 0, cu_q_lens[:-1], num_tokens)].set(True, mode="drop")
    return jnp.sum(~busy, dtype=jnp.int32), jnp.argsort(busy).astype(jnp.int32)


def decode_rows(
    kv_lens: Array, page_indices: Array, cu_q_lens: Array, idle: tuple[Array, ...], page_size: int
) -> DecodeRows:
    """`kv_lens` is 0 for rows that are not to be served."""
    order = jnp.argsort(-kv_lens).astype(jnp.int32)
    lens = kv_lens[order]
    last = page_indices.at[order, lax.div(jnp.maximum(lens, 1) - 1, page_size)].get(mode="clip")
    counts = jnp.stack([jnp.sum(kv_lens > 0, dtype=jnp.int32), idle[0]])
    by_row = [jnp.pad(x, (0, 1)) for x in (order, cu_q_lens[order], lens, jnp.maximum(last, 0))]
    return DecodeRows(jnp.concatenate([counts, *by_row, *idle[1:]]), chunked_table(page_indices, kv_lens, page_size))


def chunked_table(page_indices: Array, kv_lens: Array, page_size: int) -> Array:
    """See `DecodeRows.table`."""
    num_rows, num_pages = page_indices.shape
    used = jnp.arange(num_pages, dtype=jnp.int32) * page_size < kv_lens[:, None]
    clean = jnp.where(used, jnp.maximum(page_indices, 0), 0)
    padded = jnp.pad(clean, ((0, 0), (0, -num_pages % PAGES_A_CHUNK)))
    return padded.reshape(num_rows, -1, 1, PAGES_A_CHUNK)
