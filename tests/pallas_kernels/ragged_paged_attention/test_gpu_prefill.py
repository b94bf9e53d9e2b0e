"""The Hopper kernel for rows with many queries, called directly: interpreted with races as errors, and compiled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.aot import ptxas, toolchain
from pallas_kernels.ragged_paged_attention import gpu_prefill_schedule as tiles
from pallas_kernels.ragged_paged_attention.cases import CASES, AttentionCase, AttentionInputs, make_inputs
from pallas_kernels.ragged_paged_attention.contract import Options
from pallas_kernels.ragged_paged_attention.gpu_prefill import attend_many
from pallas_kernels.ragged_paged_attention.page_dtypes import to_page_dtype
from tests.pallas_kernels.interpreters import gpu_interpreter_without_races
from tests.pallas_kernels.ragged_paged_attention.support import TOLERANCE, error_a_token, expected

BY_NAME = {case.name: case for case in CASES}
JOBS = "tests.pallas_kernels.ragged_paged_attention.gpu_prefill_jobs"


def run(case: AttentionCase, inputs: AttentionInputs, first_row_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (sevens where the kernel serves nothing) and pages."""

    def attend(interpret, queries, keys, values, kv_pages, layer, *rows):
        options = Options.make(case.head_dim**-0.5, case.soft_cap, inputs.sinks, inputs.window, inputs.k_scale,
                               inputs.v_scale)  # fmt: skip
        schedule = tiles.make_prefill_schedule(
            *rows, num_tokens=case.num_tokens, group=case.group, page_size=case.page_size,
            first_row_class=first_row_class,
        )  # fmt: skip
        new = [to_page_dtype(x, scale, kv_pages.dtype) for x, scale in ((keys, options.k_scale),
                                                                        (values, options.v_scale))]  # fmt: skip
        pages_ref = jax.new_ref(kv_pages)
        outputs = attend_many(queries, *new, pages_ref, layer, rows[1], schedule, options, jnp.full_like(queries, 7),
                              interpret=interpret)  # fmt: skip
        return outputs, jax.freeze(pages_ref)

    with gpu_interpreter_without_races() as interpret:
        arguments = [jnp.asarray(argument) for argument in inputs.arguments()]
        outputs, pages = jax.jit(partial(attend, interpret))(*arguments)
        return np.asarray(outputs), np.asarray(pages)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # of rows that are dropped
@pytest.mark.parametrize("first_row_class", [1, 2])
def test_rows_of_other_kernels_keep_their_outputs_and_pages(first_row_class: int):
    """Rows of one and of a few queries lie beside the served ones in the same groups of 8 tokens."""
    case = BY_NAME["kernel_mixed_bfloat16_head_64"]
    inputs = make_inputs(case)
    outputs, pages = run(case, inputs, first_row_class)
    served = slice(int(inputs.cu_q_lens[inputs.distribution[first_row_class - 1]]), None)
    wanted, wanted_pages = expected(case, inputs)
    assert error_a_token(outputs[served], wanted[served]).max() <= TOLERANCE["bfloat16"]
    assert (outputs[: served.start] == 7).all()
    for row in range(len(case.rows)):
        if row < inputs.distribution[first_row_class - 1]:
            mine = inputs.page_indices[row, : -(-int(inputs.kv_lens[row]) // case.page_size)]
            wanted_pages[:, mine] = inputs.kv_pages[:, mine]
    assert pages.tobytes() == wanted_pages.tobytes()


NUM_TOKENS = 480
query_tiles = jax.jit(tiles.query_tiles, static_argnums=(3, 4))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 80), min_size=6, max_size=6), st.integers(1, 40), st.sampled_from([1, 3, 4, 16]),
       st.booleans())  # fmt: skip
def test_every_query_is_in_one_tile(q_lens: list[int], context: int, group: int, full: bool):
    num_tokens = NUM_TOKENS
    if full:  # up to the last token of the step, so that the last tile has to move
        q_lens[-1] = num_tokens - sum(q_lens[:-1])
    starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    kv_lens = np.array(q_lens, np.int32) + context
    items, count = query_tiles(kv_lens, starts[:-1], np.array(q_lens, np.int32), num_tokens, group)
    items = np.asarray(items)[: int(count)]
    size = tiles.queries_a_tile(group)
    tokens = [np.arange(first, end) for first, end in items[:, [tiles.FIRST, tiles.END]]]
    assert np.array_equal(np.sort(np.concatenate([*tokens, []])), np.arange(sum(q_lens)))
    token, end = items[:, tiles.TOKEN], items[:, tiles.END]
    assert (token % 8 == 0).all() and (token >= 0).all()
    assert (token + size <= tiles.padded_tokens(num_tokens, group)).all()
    assert (token <= items[:, tiles.FIRST]).all() and (end <= token + size).all()
    row = items[:, tiles.ROW]
    assert (items[:, tiles.POSITION] == context + token - starts[row]).all()
    assert (np.diff(items[:, tiles.POSITION] + end - token) <= 0).all(), "longest first"


# (head width, dtype of the pages, page size, all options or none), of the form that the interpreter runs and is the
# default, and of the one that has registers as operands.
COMPILED = [(64, "bfloat16", 16, True), (64, "int8", 64, False), (64, "float8_e4m3fn", 128, True),
            (128, "bfloat16", 256, False), (128, "bfloat16", 16, True), (128, "int8", 32, True),
            (128, "float8_e4m3fn", 16, True), (256, "bfloat16", 64, False), (256, "bfloat16", 16, True),
            (256, "int8", 128, True), (256, "float8_e4m3fn", 16, False)]  # fmt: skip
# The accumulator of H 256 and 8-bit pages, or options, are too much for the registers.
NOT_IN_REGISTERS = [call for call in COMPILED if call[0] == 256 and (call[1] != "bfloat16" or call[3])]


@pytest.mark.parametrize("register_operands", [False, True])
def test_compiles_for_hopper_without_spills(register_operands: bool):
    if toolchain.missing("cuda") is not None:
        pytest.skip(str(toolchain.missing("cuda")))
    calls = [call for call in COMPILED if not register_operands or call not in NOT_IN_REGISTERS]
    finished = toolchain.run(f"{JOBS}:compile_prefill", {"calls": calls, "register_operands": register_operands},
                             "cuda")  # fmt: skip
    kernels = [kernel for kernel in ptxas.read(finished.log) if "mosaic" in kernel.name]
    assert len(kernels) >= 2 * len(calls)
    assert {kernel.spill_stores + kernel.spill_loads + kernel.stack_frame for kernel in kernels} == {0}
    assert "wgmma.mma_async instructions are serialized" not in finished.log
    for memory in finished.value:
        assert memory["temporaries"] < memory["pages"] / 4 and memory["aliased"] == memory["pages"]
