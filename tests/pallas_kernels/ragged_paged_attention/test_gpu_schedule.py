"""The work list of Hopper decode: every tile once, equal shares, splits that follow from the row alone; refusals."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import Device
from pallas_kernels.ragged_paged_attention import AttentionSpec, gpu, gpu_schedule
from pallas_kernels.ragged_paged_attention.gpu_schedule import DecodeBlocks
from pallas_kernels.ragged_paged_attention.gpu_units import choose_blocks

NUM_ROWS, NUM_PAGES_A_ROW, PAGE_SIZE, NUM_KV_HEADS, KV_TOKENS = 6, 40, 16, 3, 64
BLOCKS = DecodeBlocks(KV_TOKENS, slots=2, num_blocks=7, split_tokens=128, max_splits=4, combine_blocks=1)
SPEC = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16, max_q_len=1,
                     device=Device("gpu", "NVIDIA H200"))  # fmt: skip


@jax.jit
def schedule_of(kv_lens, page_indices, distribution):
    return gpu_schedule.make_decode_schedule(
        kv_lens, page_indices, jnp.arange(NUM_ROWS + 1, dtype=jnp.int32), distribution, num_tokens=NUM_ROWS + 2,
        num_kv_heads=NUM_KV_HEADS, page_size=PAGE_SIZE, queries=1, all_rows=True, blocks=BLOCKS,
    )  # fmt: skip


def make(kv_lens: list[int]):
    page_indices = np.arange(NUM_ROWS * NUM_PAGES_A_ROW, dtype=np.int32).reshape(NUM_ROWS, -1)
    page_indices = np.where(np.arange(NUM_PAGES_A_ROW) * PAGE_SIZE < np.array(kv_lens)[:, None], page_indices, -7)
    lens = np.array(kv_lens, np.int32)
    return jax.tree.map(np.asarray, schedule_of(lens, page_indices, np.full(3, NUM_ROWS, np.int32))), page_indices


def walk(schedule) -> list[list[tuple[int, int, int]]]:
    """(entry, head, split) of each block's units, as the kernel walks."""
    walks = []
    for entry, head, split, count in schedule.starts:
        units = []
        for _ in range(count):
            units.append((int(entry), int(head), int(split)))
            split += 1
            if split == schedule.rows[entry, gpu_schedule.SPLITS]:
                split, head = 0, head + 1
            if head == NUM_KV_HEADS:
                head, entry = 0, entry + 1
        walks.append(units)
    return walks


def test_partial_results_have_memory_for_the_splits_of_the_longest_row_and_no_more():
    lens = np.full(NUM_ROWS, PAGE_SIZE * NUM_PAGES_A_ROW, np.int32)
    pages = np.zeros((NUM_ROWS, NUM_PAGES_A_ROW), np.int32)
    made = gpu_schedule.make_decode_schedule(
        lens, pages, np.arange(NUM_ROWS + 1, dtype=np.int32), np.full(3, NUM_ROWS, np.int32), num_tokens=NUM_ROWS,
        num_kv_heads=NUM_KV_HEADS, page_size=PAGE_SIZE, queries=1, all_rows=True,
        blocks=replace(BLOCKS, split_tokens=256, max_splits=32),
    )  # fmt: skip
    assert made.blocks.max_splits == 3, "640 tokens in splits of 256"
    assert (made.rows[:, gpu_schedule.SPLITS] == 3).all()


lengths = st.lists(st.one_of(st.just(0), st.integers(1, PAGE_SIZE * NUM_PAGES_A_ROW)), min_size=NUM_ROWS,
                   max_size=NUM_ROWS)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kv_lens=lengths)
def test_every_unit_is_walked_once_in_equal_shares(kv_lens: list[int]):
    schedule, _ = make(kv_lens)
    active = [row for row, kv_len in enumerate(kv_lens) if kv_len]
    entries = schedule.rows[: len(active)]
    assert entries[:, gpu_schedule.TOKEN].tolist() == active
    assert (schedule.rows[len(active) :, gpu_schedule.SPLITS] == 0).all()
    assert schedule.silent.tolist() == [int(kv_len == 0) for kv_len in kv_lens] + [1, 1]
    tiles = [-(-kv_lens[row] // KV_TOKENS) for row in active]
    splits, size = entries[:, gpu_schedule.SPLITS], entries[:, gpu_schedule.SPLIT_TILES]
    assert (splits >= 1).all() and (splits <= BLOCKS.max_splits).all()
    assert ((splits - 1) * size < tiles).all() and (splits * size >= tiles).all()
    walks = walk(schedule)
    wanted = [(e, h, s) for e in range(len(active)) for h in range(NUM_KV_HEADS) for s in range(splits[e])]
    assert [unit for units in walks for unit in units] == wanted
    cost = [sum(min(size[e], tiles[e] - s * size[e]) + gpu_schedule.UNIT_COST for e, _, s in units) for units in walks]
    largest = max((n + gpu_schedule.UNIT_COST for n in size), default=0)
    assert max(cost) <= sum(cost) / BLOCKS.num_blocks + largest + 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(kv_lens=lengths, others=lengths, row=st.integers(0, NUM_ROWS - 1))
def test_splits_of_a_row_and_its_pages_depend_on_the_row_alone(kv_lens: list[int], others: list[int], row: int):
    kv_len = max(kv_lens[row], 1)
    found = []
    for lens in (kv_lens, others):
        lens = [*lens[:row], kv_len, *lens[row + 1 :]]
        schedule, page_indices = make(lens)
        entry = sum(n > 0 for n in lens[:row])
        found.append(schedule.rows[entry, : gpu_schedule.SLOT].tolist())
        num_pages = -(-kv_len // PAGE_SIZE)
        own = page_indices[row, :num_pages]
        assert schedule.table[entry].tolist() == [*own, *[own[-1]] * (schedule.table.shape[1] - num_pages)]
    assert found[0] == found[1]


def test_blocks_fill_the_card():
    """The figures behind the constants: units for every SM from one row of 1,024 tokens on, rings that hide latency."""
    one = choose_blocks(SPEC, 1, num_rows=1)
    assert 1024 // one.split_tokens * SPEC.num_kv_heads >= 128 and one.num_blocks == 264
    many = choose_blocks(SPEC, 1, num_rows=32)
    assert many.split_tokens == 512
    tile_bytes = 2 * many.kv_tokens * SPEC.head_dim * 2
    assert 64 << 10 <= many.slots * tile_bytes <= 113 << 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": Device("cpu", "cpu")}, "runs on Hopper GPUs (sm_90a), this is cpu"),
        ({"device": Device("gpu", "NVIDIA A100-SXM4-80GB")}, "Hopper only (sm_90a), this is NVIDIA A100-SXM4-80GB"),
        ({"device": Device("gpu", "NVIDIA H20")}, None),
        ({"device": Device("gpu", "NVIDIA GH200 480GB")}, None),
        ({"device": Device("gpu", "NVIDIA B200")}, "Hopper only (sm_90a), this is NVIDIA B200"),
        ({"device": Device("cpu", "cpu"), "interpret": True}, None),
        ({"dtype": "float32"}, "dtype float32 is not bfloat16 (float32 would be rounded to it by wgmma)"),
        ({"head_dim": 96}, "head_dim 96 is not one of (64, 128, 256)"),
        ({"page_size": 8}, "page_size 8 is not one of (16, 32, 64, 128, 256)"),
    ],
)
def test_reasons(change: dict, reason: str | None):
    reasons = gpu.unsupported_reasons(replace(SPEC, **change))
    assert (reason is None and not reasons) or reason in reasons
