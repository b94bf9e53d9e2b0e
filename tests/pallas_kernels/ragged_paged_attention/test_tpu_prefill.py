"""The TPU kernels for rows with more than one query, called directly with small blocks, so that a few hundred tokens
cross many of them. Interpreted, races are errors; the suite's cases run in `test_cases_on_tpu`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import Device
from pallas_kernels.ragged_paged_attention.cases import AttentionCase, AttentionInputs, make_inputs
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec, Options
from pallas_kernels.ragged_paged_attention.page_dtypes import to_page_dtype
from pallas_kernels.ragged_paged_attention.tpu_prefill import attend_many
from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import PrefillBlocks, prefill_blocks
from pallas_kernels.ragged_paged_attention.tpu_prefill_schedule import make_prefill_schedule
from tests.pallas_kernels.interpreters import DMA_MODES, DmaMode, tpu_interpreter_without_races
from tests.pallas_kernels.ragged_paged_attention.support import TOLERANCE, error_a_token, expected, options_of

# Two blocks of 128 a fetch: the smallest that have both sizes of masks.
TILES = PrefillBlocks(queries=16, fetch=256, compute=256, masked=128, rows=16, masked_rows=16, lead=2, masked_lead=1,
                      chunk=16, at_once=8, write=16)  # fmt: skip
BASE = AttentionCase("rows", (), num_kv_heads=1, group=2, head_dim=128, page_size=16, max_pages=48, num_layers=1,
                     layer=0, dtype="bfloat16", kv_dtype="bfloat16")  # fmt: skip


def run(
    case: AttentionCase, inputs: AttentionInputs, blocks: PrefillBlocks | None, mode: DmaMode
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (ones where the kernels serve nothing) and pages of a case without one-query rows."""
    options = options_of(case, inputs)
    options = Options.make(*(options[name] for name in ("scale", "soft_cap", "sinks", "window", "k_scale", "v_scale")))

    def attend(queries, keys, values, kv_pages, layer, kv_lens, page_indices, cu_q_lens, distribution, outputs):
        spec = AttentionSpec(queries.shape[1], keys.shape[1], case.head_dim, case.page_size, queries.dtype,
                             kv_pages.dtype, case.max_q_len)  # fmt: skip
        schedule = make_prefill_schedule(
            kv_lens, page_indices, cu_q_lens, distribution, len(queries), spec, blocks or prefill_blocks(spec)
        )
        new = [to_page_dtype(x, s, kv_pages.dtype) for x, s in ((keys, options.k_scale), (values, options.v_scale))]
        new_kv = jnp.stack(new, axis=1)
        return attend_many(outputs, queries, new_kv, kv_pages, layer.reshape(1), schedule, options, interpret=interpret)

    arguments = [jnp.asarray(argument) for argument in inputs.arguments()]
    with tpu_interpreter_without_races(mode) as interpret:
        before = jnp.ones_like(arguments[0])
        outputs, pages = jax.block_until_ready(jax.jit(attend)(*arguments, before))
    return np.asarray(outputs), np.asarray(pages)


def assert_served(case: AttentionCase, mode: DmaMode = "on_wait", blocks: PrefillBlocks | None = TILES, seed=0):
    """Right where rows are served; elsewhere the outputs that were given, and pages byte for byte."""
    inputs = make_inputs(case, seed)
    outputs, pages = run(case, inputs, blocks, mode)
    wanted, wanted_pages = expected(case, inputs)
    served = wanted.any(axis=(1, 2))
    assert error_a_token(outputs[served], wanted[served]).max(initial=0) <= TOLERANCE[case.dtype]
    assert (outputs[~served] == 1).all()
    assert pages.tobytes() == wanted_pages.tobytes()


@pytest.mark.parametrize("mode", DMA_MODES)
@pytest.mark.parametrize("window", [0, 150])
def test_tiles_that_share_packed_tokens_and_cross_blocks(mode: DmaMode, window: int):
    """A whole prompt, a continuation, a neighbour in one packed tile, an inactive row between, padding behind."""
    case = replace(
        BASE, rows=((5, 600), (20, 20), (7, 0), (3, 530), (40, 300)), window=window, num_padding_tokens=6,
        num_padding_rows=1,
    )  # fmt: skip
    assert_served(case, mode)


@pytest.mark.parametrize("first", [0, 15, 17])
def test_new_tokens_cross_the_border_of_a_page(first: int):
    """Every alignment of old context and packed tokens to pages; the unwritten slots are NaN and stay so."""
    assert_served(replace(BASE, rows=((2, first + 2), (17, first + 17), (33, first + 33))))


def test_nothing_to_do_leaves_outputs_and_pages():
    assert_served(replace(BASE, rows=((2, 0), (9, 0)), num_padding_tokens=3))


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
def test_the_units_that_chips_run(kind: str):
    """Off a TPU the rule has few and large units; these are the ones that are compiled for it."""
    case = replace(BASE, rows=((130, 700), (9, 9)), group=4)
    spec = AttentionSpec(case.group, case.num_kv_heads, case.head_dim, case.page_size, device=Device("tpu", kind))
    blocks = prefill_blocks(spec)
    assert blocks.lead > 1 and blocks.at_once > 8
    assert_served(case, blocks=blocks)


@pytest.mark.parametrize("mode", DMA_MODES)
@pytest.mark.parametrize("max_q_len", [2, 5, 16])
def test_verification_of_up_to_fifteen_drafted_tokens(mode: DmaMode, max_q_len: int):
    rows = ((max_q_len, 280), (1, 1), (max_q_len, max_q_len), (2, 0), (2, 257))
    assert_served(replace(BASE, rows=rows, max_q_len=max_q_len), mode, blocks=None)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 20), st.one_of(st.just(-1), st.integers(0, 290))), min_size=1, max_size=4
    ),
    window=st.sampled_from([0, 1, 40, 129]),
    seed=st.integers(0, 100),
)
def test_any_mix_of_rows(lengths: list[tuple[int, int]], window: int, seed: int):
    """Of each row: new tokens, and tokens before them (-1: the row is inactive). One static shape."""
    rows = tuple((q_len, q_len + before if before >= 0 else 0) for q_len, before in lengths)
    used = sum(q_len for q_len, _ in rows)
    case = replace(BASE, rows=rows, num_padding_rows=4 - len(rows), num_padding_tokens=80 - used, window=window,
                   num_pages=90)  # fmt: skip
    assert_served(case, seed=seed)
