"""The TPU kernel for rows of one query, in the interpreter: blocks, their ends, windows, cores, and its schedule."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import tpu
from pallas_kernels.ragged_paged_attention.cases import AttentionCase, AttentionInputs, kernel_case, make_inputs
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec, Options
from pallas_kernels.ragged_paged_attention.page_dtypes import to_page_dtype
from pallas_kernels.ragged_paged_attention.tpu_decode import DecodeBlocks, attend_decode
from pallas_kernels.ragged_paged_attention.tpu_schedule import PAGES_A_CHUNK, ScalarLayout, make_schedule
from tests.pallas_kernels.interpreters import DMA_MODES, tpu_interpreter_without_races
from tests.pallas_kernels.ragged_paged_attention.support import assert_right, from_layout, options_of, to_layout_of

SMALL = DecodeBlocks(kv=128, depth=2)
# Around the ends of groups of 16, pages of 32 and blocks of 128, one or several blocks.
BOUNDARIES = (1, 16, 17, 32, 33, 127, 128, 129, 0, 144, 255, 256, 257)


def decode_case(lens: tuple[int, ...], **fields) -> AttentionCase:
    rows = {"rows": tuple((1, n) for n in lens), "num_single": len(lens), "page_size": 32, "max_pages": 9}
    return replace(kernel_case("decode", "kernel_decode"), **rows | fields)


def caller(case: AttentionCase, interpret: Any, blocks: DecodeBlocks = SMALL, num_cores: int = 1) -> Callable:
    """Jitted once for all inputs of the case's static shape: inputs to (outputs, pages in the reference's layout)."""
    options = options_of(case, make_inputs(replace(case, rows=((1, 1),) * len(case.rows))))
    scale, soft_cap = options["scale"], options["soft_cap"]

    def attend(arguments, sinks, window, k_scale, v_scale):
        queries, keys, values, kv_pages, layer, *rows = arguments
        spec = AttentionSpec(case.num_kv_heads * case.group, case.num_kv_heads, case.head_dim, case.page_size,
                             case.dtype, case.kv_dtype, max_q_len=1)  # fmt: skip
        schedule = make_schedule(*rows, num_tokens=case.num_tokens, spec=spec)
        new_kv = tpu.join(*(to_page_dtype(new, s, kv_pages.dtype) for new, s in ((keys, k_scale), (values, v_scale))))
        return attend_decode(
            queries, new_kv, kv_pages, layer, schedule.decode,
            Options.make(scale, soft_cap, sinks, window, k_scale, v_scale), blocks=blocks,
            max_pages=case.max_pages, num_cores=num_cores, interpret=interpret,
        )  # fmt: skip

    jitted = jax.jit(attend)

    def call(inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
        arguments = list(inputs.arguments())
        arguments[3] = to_layout_of("tpu", case, inputs.kv_pages)
        arguments = [jnp.asarray(argument) for argument in arguments]
        outputs, pages = jitted(arguments, inputs.sinks, inputs.window, inputs.k_scale, inputs.v_scale)
        return np.asarray(outputs), from_layout(np.asarray(pages))

    return call


@pytest.mark.parametrize("dma_mode", DMA_MODES)
@pytest.mark.parametrize("fields", [{}, {"head_dim": 64, "kv_dtype": "int8"}], ids=["bfloat16", "int8_head_64"])
def test_rows_that_end_at_every_boundary(fields: dict, dma_mode):
    case = decode_case(BOUNDARIES, **fields)
    inputs = make_inputs(case)
    with tpu_interpreter_without_races(dma_mode) as interpret:
        assert_right(case, inputs, *caller(case, interpret)(inputs))


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_any_depth_of_fetching(depth: int):
    """More blocks in flight than a row has, and fewer."""
    case = decode_case((300, 1, 1, 260, 0, 40), page_size=64, max_pages=5, dtype="float32", kv_dtype="float32")
    inputs = make_inputs(case)
    with tpu_interpreter_without_races() as interpret:
        assert_right(case, inputs, *caller(case, interpret, DecodeBlocks(128, depth))(inputs))


@pytest.mark.parametrize("lens", [(130, 20, 0, 5, 300), (7,), (0, 0)])
def test_cores_take_rows_in_turn(lens: tuple[int, ...]):
    """The interpreter runs the cores one after the other; a core may have no row at all."""
    case = decode_case(lens, max_pages=10, num_padding_rows=2, num_padding_tokens=3)
    inputs = make_inputs(case)
    with tpu_interpreter_without_races() as interpret:
        assert_right(case, inputs, *caller(case, interpret, num_cores=2)(inputs))


def test_blocks_before_the_window_are_skipped():
    """One program serves all windows. Pages that lie before the window are not read: theirs are NaN."""
    case = decode_case((300, 128, 129, 31), max_pages=10, window=1)
    with tpu_interpreter_without_races() as interpret:
        call = caller(case, interpret)
        for window in (0, 1, 17, 128, 130, 1000):
            windowed = replace(case, window=window)
            inputs = make_inputs(windowed)
            if window:
                poison_before_window(windowed, inputs)
            outputs, pages = call(inputs)
            assert_right(windowed, inputs, outputs, pages)


def poison_before_window(case: AttentionCase, inputs: AttentionInputs) -> None:
    for (_, kv_len), pages in zip(case.rows, inputs.page_indices, strict=True):
        unseen = max(kv_len - (case.window or 0), 0) // case.page_size
        inputs.kv_pages[:, pages[:unseen]] = np.nan


def test_a_page_table_of_several_chunks():
    case = decode_case((16 * PAGES_A_CHUNK + 200, 3), page_size=16, max_pages=2 * PAGES_A_CHUNK, num_kv_heads=1)
    inputs = make_inputs(case)
    with tpu_interpreter_without_races() as interpret:
        assert_right(case, inputs, *caller(case, interpret, DecodeBlocks(512, 2))(inputs))


@pytest.fixture(scope="module")
def ragged() -> AttentionCase:
    return decode_case((0,) * 5, page_size=16, max_pages=18, num_pages=5 * 18, num_kv_heads=1, window=0, sinks=True)


@pytest.fixture(scope="module")
def call_ragged(ragged: AttentionCase):
    with tpu_interpreter_without_races() as interpret:
        yield caller(ragged, interpret)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lens=st.lists(st.one_of(st.just(0), st.integers(1, 288)), min_size=1, max_size=5),
       window=st.sampled_from([0, 1, 40, 150]), seed=st.integers(0, 100))  # fmt: skip
def test_any_lengths(ragged: AttentionCase, call_ragged: Callable, lens: list[int], window: int, seed: int):
    padding = len(ragged.rows) - len(lens)
    case = replace(ragged, rows=tuple((1, n) for n in lens), num_single=len(lens), window=window,
                   num_padding_rows=padding, num_padding_tokens=padding)  # fmt: skip
    inputs = make_inputs(case, seed)
    assert_right(case, inputs, *call_ragged(inputs))


def test_the_schedule_lists_rows_in_use_longest_first_and_cleans_the_table():
    case = decode_case((5, 0, 300, 40), max_pages=130, num_padding_rows=2, num_padding_tokens=3)
    inputs = make_inputs(case)
    spec = AttentionSpec(4, 2, 128, case.page_size, max_q_len=1)
    rows = inputs.kv_lens, inputs.page_indices, inputs.cu_q_lens, inputs.distribution
    decode = jax.jit(lambda *rows: make_schedule(*rows, num_tokens=case.num_tokens, spec=spec))(*rows).decode
    scalars, layout = np.asarray(decode.scalars), ScalarLayout(case.num_rows)
    assert scalars[layout.num_busy] == 3 and scalars[layout.num_idle] == 4
    assert list(scalars[layout.row :][:3]) == [2, 3, 0] and list(scalars[layout.token :][:3]) == [2, 3, 0]
    assert list(scalars[layout.kv_len :][: case.num_rows + 1]) == [300, 40, 5, 0, 0, 0, 0]
    assert list(scalars[layout.last_page :][:3]) == [inputs.page_indices[2, 9], inputs.page_indices[3, 1],
                                                     inputs.page_indices[0, 0]]  # fmt: skip
    assert sorted(scalars[layout.idle :][:4]) == [1, 4, 5, 6]
    table = np.asarray(decode.table).reshape(case.num_rows, -1)
    assert table.shape == (6, 2 * PAGES_A_CHUNK)
    for row, used in zip(table, (1, 0, 10, 2, 0, 0), strict=True):
        assert (row[used:] == 0).all()
    assert list(table[2, :10]) == list(inputs.page_indices[2, :10])


def test_every_reason_against_a_call_is_given():
    spec = AttentionSpec(4, 2, head_dim=96, page_size=24, dtype=jnp.float16, kv_dtype=jnp.float16, max_q_len=1)
    reasons = tpu.unsupported_reasons(spec)
    for part in ("runs on TPUs", "head_dim 96", "page_size 24", "dtype float16", "kv_dtype float16"):
        assert any(reason.startswith(part) for reason in reasons), part
    assert tpu.unsupported_reasons(AttentionSpec(4, 2, 128, 16, max_q_len=1, interpret=True)) == []
