"""Attention on Hopper for the tool: shape classes, candidates that fit shared memory, calls with given blocks."""

import itertools
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import gpu, gpu_blocks, gpu_schedule, gpu_units
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec, Options
from pallas_kernels.ragged_paged_attention.gpu_prefill import attend_many
from pallas_kernels.ragged_paged_attention.gpu_prefill_schedule import make_prefill_schedule
from pallas_kernels.ragged_paged_attention.gpu_prefill_unit import PrefillBlocks
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled, to_page_dtype
from pallas_kernels.tune.calls import Blocks, Call, Key, shape_of

PAGE_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
# Of a decoding row, and tokens of a prompt.
CONTEXT, PROMPT = 4096, 4096
# Query heads a kv head, by kv heads of a shard: 8B whole, 70B on eight devices.
GROUPS = {8: 4, 1: 8}
# A block's shared memory on Hopper (CUDA C++ programming guide, technical specifications), less 2 KB for barriers.
MOST_SHARED_MEMORY = (227 - 2) << 10


def decode_classes() -> tuple[Key, ...]:
    return tuple(
        gpu_blocks.decode_key(decode_spec(num_kv_heads, head_dim, dtype, page_size), 1, num_rows)
        for num_kv_heads, head_dim, dtype, page_size, num_rows in itertools.product(
            GROUPS, gpu.HEAD_DIMS, PAGE_DTYPES, (16, 64), (1, 32)
        )
    )


def decode_spec(num_kv_heads: int, head_dim: int, kv_dtype: str, page_size: int) -> AttentionSpec:
    num_q_heads = GROUPS[num_kv_heads] * num_kv_heads
    return AttentionSpec(num_q_heads, num_kv_heads, head_dim, page_size, jnp.bfloat16, kv_dtype, max_q_len=1)


def spec_of(key: Key) -> AttentionSpec:
    head_dim = int(str(key["columns"]).split(" x ")[1])
    return decode_spec(int(key["kv_heads"]), head_dim, str(key["kv_dtype"]), int(key["page_size"]))


def decode_candidates(key: Key, platform: str) -> list[Blocks]:
    """Around the rule: tiles of 128 tokens where H is 64, one block an SM where the rule has two, shorter and longer
    splits.
    """
    if platform != "gpu":
        return []
    spec, num_rows = spec_of(key), int(key["rows"])
    rule = gpu_units.choose_blocks(spec, 1, num_rows)
    found = []
    for kv_tokens in (64, 128) if spec.head_dim == 64 else (64,):
        for blocks_an_sm in range(1, rule.num_blocks // gpu_units.NUM_SMS + 1):
            slots = gpu_units.slots_that_fit(spec, 1, kv_tokens, blocks_an_sm)
            shortest = max(rule.split_tokens // 2, kv_tokens)
            found += [
                replace(rule, kv_tokens=kv_tokens, slots=slots, num_blocks=gpu_units.NUM_SMS * blocks_an_sm,
                        split_tokens=shortest << doubled)
                for doubled in range(3)
            ]  # fmt: skip
    return [asdict(blocks) for blocks in found]


def decode_call(key: Key, blocks: Blocks) -> Call:
    """A decode step of rows from a half of CONTEXT to all of it."""
    spec, num_rows = spec_of(key), int(key["rows"])
    lens = np.array([CONTEXT - row * CONTEXT // (2 * num_rows) for row in range(num_rows)], np.int32)

    def step(queries, keys, values, pages, layer, kv_lens, table, cu_q_lens, distribution, *scales):
        rows = (kv_lens, table, cu_q_lens, distribution)
        few = gpu_schedule.make_decode_schedule(
            *rows, num_tokens=num_rows, num_kv_heads=spec.num_kv_heads, page_size=spec.page_size, queries=1,
            all_rows=True, blocks=gpu_schedule.DecodeBlocks(**blocks),
        )  # fmt: skip
        return gpu.attend(
            queries, keys, values, pages, layer, *rows, schedule=gpu.Schedule(few, None),
            scale=spec.head_dim**-0.5, max_q_len=1, **named(scales),
        )  # fmt: skip

    return call(step, spec, lens, np.ones(num_rows, np.int32), num_rows)


def prefill_classes() -> tuple[Key, ...]:
    return tuple(
        gpu_blocks.prefill_key(*key) for key in itertools.product(gpu.HEAD_DIMS, PAGE_DTYPES, (4, 8), (16, 64))
    )


def prefill_candidates(key: Key, platform: str) -> list[Blocks]:
    """All that fit shared memory, of the form that the interpreter runs: the other one is no candidate before its
    results have been compared on a card. Not one slot: nothing would come while a tile is multiplied, and some spill.
    """
    if platform != "gpu":
        return []
    sizes = itertools.product((64, 128), (2, 3), (1, 2))
    found = [PrefillBlocks(kv_tokens, slots, query_slots) for kv_tokens, slots, query_slots in sizes]
    width, dtype = int(str(key["width"])), str(key["kv_dtype"])
    return [asdict(blocks) for blocks in found if blocks.shared_bytes(width, dtype) <= MOST_SHARED_MEMORY]


def prefill_call(key: Key, blocks: Blocks) -> Call:
    """One prompt of PROMPT tokens and 8 kv heads."""
    num_kv_heads, group, page_size = 8, int(key["group"]), int(key["page_size"])
    head_dim, kv_dtype = int(str(key["width"])), str(key["kv_dtype"])
    spec = AttentionSpec(group * num_kv_heads, num_kv_heads, head_dim, page_size, jnp.bfloat16, kv_dtype)

    def step(queries, keys, values, pages, layer, kv_lens, table, cu_q_lens, distribution, *scales):
        schedule = make_prefill_schedule(kv_lens, table, cu_q_lens, distribution, num_tokens=PROMPT, group=group,
                                         page_size=page_size, first_row_class=0)  # fmt: skip
        k_scale, v_scale = scales or (None, None)
        options = Options.make(head_dim**-0.5, None, None, None, k_scale, v_scale)
        keys, values = to_page_dtype(keys, k_scale, kv_dtype), to_page_dtype(values, v_scale, kv_dtype)
        pages_ref = jax.new_ref(pages)
        outputs = attend_many(
            queries, keys, values, pages_ref, layer, table, schedule, options, jnp.zeros_like(queries),
            blocks=PrefillBlocks(**blocks),
        )  # fmt: skip
        return outputs, jax.freeze(pages_ref)

    lens = np.array([PROMPT], np.int32)
    return call(step, spec, lens, lens, 0)


def call(step: Any, spec: AttentionSpec, kv_lens: np.ndarray, q_lens: np.ndarray, num_single: int) -> Call:
    """step(queries, keys, values, pages, layer, *rows, *scales) with pages of two layers; each row has its own."""
    num_rows, num_tokens = len(kv_lens), int(q_lens.sum())
    pages_a_row = -(-int(kv_lens.max()) // spec.page_size)
    table = np.arange(num_rows * pages_a_row, dtype=np.int32).reshape(num_rows, pages_a_row)
    shape = (2, num_rows * pages_a_row, 2, spec.num_kv_heads, spec.page_size, spec.head_dim)
    rows = (
        kv_lens, table, np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
        np.array([num_single, num_single, num_rows], np.int32),
    )  # fmt: skip
    new = shape_of("bfloat16", num_tokens, spec.num_kv_heads, spec.head_dim)
    queries = shape_of("bfloat16", num_tokens, spec.num_q_heads, spec.head_dim)
    scales = [shape_of("float32", spec.num_kv_heads)] * (2 if is_scaled(spec.kv_dtype) else 0)
    arguments = (queries, new, new, shape_of(spec.kv_dtype, *shape), np.zeros(1, np.int32), *rows, *scales)
    return Call(step, arguments, pages=3)


def named(scales: tuple) -> dict[str, Any]:
    return dict(zip(("k_scale", "v_scale"), scales, strict=True)) if scales else {}
