"""Attention on TPUs for the tool: shape classes, candidates, calls with given blocks.

The classes are what shards of models of 8B and 70B parameters need: 8 kv heads on one device, 2 on each of four, 1 on
each of eight.
"""

import itertools
from dataclasses import asdict

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import tpu as attention_tpu
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled
from pallas_kernels.ragged_paged_attention.tpu_decode import DecodeBlocks
from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import blocks_with, prefill_key
from pallas_kernels.ragged_paged_attention.tpu_schedule import make_schedule
from pallas_kernels.tune.calls import Blocks, Call, Key, shape_of

# Rows of a decode step; new tokens of a prefill step.
NUM_ROWS = 8
PREFILLED = 1024
# Of 8B whole (32 query heads) and on four devices, of 70B (64) on eight.
QUERY_HEADS = {8: 32, 2: 8, 1: 8}


def decode_classes() -> tuple[Key, ...]:
    dtypes, heads = ("bfloat16", "int8", "float8_e4m3fn"), itertools.product((8, 2, 1), (64, 128, 256))
    return tuple(
        attention_tpu.decode_key(num_kv_heads, head_dim, dtype, page_size, max_context)
        for (num_kv_heads, head_dim), dtype, page_size, max_context in itertools.product(
            heads, dtypes, (16, 64, 128), (1024, 8192)
        )
    )


def decode_candidates(key: Key, platform: str) -> list[Blocks]:
    """On a TPU: powers of two up to what a row can hold, large ones last: waits at ends of blocks are not predicted.
    What does not fit VMEM is found by compiling. Four blocks in VMEM keep three in flight; how many is no matter of the
    schedule.
    """
    if platform != "tpu":
        return []
    return [asdict(DecodeBlocks(kv=kv, depth=4)) for kv in (256, 512, 1024, 2048) if kv <= int(key["max_context"])]


def decode_call(key: Key, blocks: Blocks) -> Call:
    """A decode step of NUM_ROWS rows, from an eighth of the class's longest context to all of it."""
    num_kv_heads, max_context = heads_of(key)[0], int(key["max_context"])
    kv_lens = np.array([max_context * (row + 1) // NUM_ROWS - row for row in range(NUM_ROWS)], np.int32)
    return attention_call(
        key, QUERY_HEADS[num_kv_heads], kv_lens, max_context, q_len=1, decode_blocks=DecodeBlocks(**blocks)
    )


def prefill_classes() -> tuple[Key, ...]:
    """As `decode_classes`; the group is that of the models."""
    dtypes, heads = ("bfloat16", "int8", "float8_e4m3fn"), itertools.product((8, 2, 1), (64, 128, 256))
    return tuple(
        prefill_key(QUERY_HEADS[num_kv_heads], num_kv_heads, head_dim, dtype, page_size)
        for (num_kv_heads, head_dim), dtype, page_size in itertools.product(heads, dtypes, (16, 128))
    )


def prefill_candidates(key: Key, platform: str) -> list[Blocks]:
    """On a TPU: units of fewer and of more rows, with and without masks, closer and farther apart."""
    if platform != "tpu":
        return []
    plain = ({"rows": 64, "lead": 3}, {"rows": 64, "lead": 2}, {"rows": 128, "lead": 2})
    masked = ({"masked": 256, "masked_lead": 3, "chunk": 16}, {"masked": 512, "masked_lead": 2, "chunk": 32})
    shared = {"fetch": 512, "compute": 512, "masked_rows": 64, "at_once": 16}
    return [shared | one | other for one, other in itertools.product(plain, masked)]


def prefill_call(key: Key, blocks: Blocks) -> Call:
    """A piece of PREFILLED tokens of one row behind a longer context."""
    num_q_heads = heads_of(key)[0] * int(key["group"])
    kv_lens = np.array([4 * PREFILLED], np.int32)
    return attention_call(key, num_q_heads, kv_lens, 4 * PREFILLED, q_len=PREFILLED, units=blocks)


def heads_of(key: Key) -> tuple[int, int]:
    """(K, H)"""
    num_kv_heads, head_dim = str(key["heads"]).split(" x ")
    return int(num_kv_heads), int(head_dim)


def attention_call(
    key: Key,
    num_q_heads: int,
    kv_lens: np.ndarray,
    max_context: int,
    *,
    q_len: int,
    decode_blocks: DecodeBlocks | None = None,
    units: Blocks | None = None,
) -> Call:
    """The TPU kernels with given blocks on rows of `q_len` queries each. kv_lens: i32[R], at most max_context."""
    (num_kv_heads, head_dim), num_rows = heads_of(key), len(kv_lens)
    page_size, kv_dtype, num_tokens = int(key["page_size"]), str(key["kv_dtype"]), num_rows * q_len
    pages_a_row = -(-max_context // page_size)
    shape = attention_tpu.kv_pages_shape(2, num_rows * pages_a_row, page_size, num_kv_heads, head_dim, kv_dtype)
    max_q_len = 1 if q_len == 1 else None
    spec = AttentionSpec(num_q_heads, num_kv_heads, head_dim, page_size, jnp.bfloat16, kv_dtype, max_q_len=max_q_len)
    scales = {"k_scale": shape_of("float32", num_kv_heads), "v_scale": shape_of("float32", num_kv_heads)}
    given = scales if is_scaled(kv_dtype) else {}

    def step(queries, keys, values, pages, layer, kv_lens, page_indices, cu_q_lens, distribution, *options):
        rows = (kv_lens, page_indices, cu_q_lens, distribution)
        blocks = None if units is None else blocks_with(spec, units)
        schedule = make_schedule(*rows, num_tokens=num_tokens, spec=spec, blocks=blocks)
        return attention_tpu.attend(
            queries, keys, values, pages, layer, *rows, schedule=schedule, scale=head_dim**-0.5, max_q_len=max_q_len,
            blocks=decode_blocks, **dict(zip(given, options, strict=True)),
        )  # fmt: skip

    table = np.arange(num_rows * pages_a_row, dtype=np.int32).reshape(num_rows, pages_a_row)
    classes = np.array([num_rows * (q_len == 1), num_rows * (q_len == 1), num_rows], np.int32)
    known = (np.int32(1), kv_lens, table, np.arange(num_rows + 1, dtype=np.int32) * q_len, classes)
    new = shape_of("bfloat16", num_tokens, num_kv_heads, head_dim)
    queries = shape_of("bfloat16", num_tokens, num_q_heads, head_dim)
    return Call(step, (queries, new, new, shape_of(kv_dtype, *shape), *known, *given.values()), pages=3)
