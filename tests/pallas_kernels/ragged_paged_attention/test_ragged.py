"""Any mix of rows: right answers, and a row's bytes do not depend on the other rows of the batch."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.cases import AttentionCase, AttentionInputs, make_inputs
from tests.pallas_kernels.ragged_paged_attention.support import assert_right

MAX_ROWS, MAX_TOKENS, MAX_LEN = 6, 40, 48
# One static shape a mode, compiled once. LONG rows span several blocks of context.
BASE = AttentionCase(
    "ragged", (), page_size=4, max_pages=MAX_LEN // 4, num_pages=MAX_ROWS * MAX_LEN // 4, num_layers=1, layer=0
)
LONG = replace(BASE, max_pages=80, num_pages=MAX_ROWS * 80)
few_examples = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def call() -> Callable:
    """Jitted once for the module: the window is traced, the mode is static."""

    @partial(jax.jit, static_argnames="max_q_len")
    def attend(*arguments, window, max_q_len):
        return ragged_paged_attention(*arguments, window=window, scale=0.25, max_q_len=max_q_len)

    def run(case: AttentionCase, inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
        arguments = (jnp.asarray(argument) for argument in inputs.arguments())
        outputs, pages = attend(*arguments, window=inputs.window, max_q_len=case.max_q_len)
        return np.asarray(outputs), np.asarray(pages)

    return run


def padded(
    rows: list[tuple[int, int]], max_q_len: int | None, base: AttentionCase = BASE, window: int = 0
) -> AttentionCase:
    """A case of the static shape of its mode: one-query rows first, padding behind."""
    rows = sorted(rows, key=lambda row: row[0] != 1)
    num_tokens = sum(q_len for q_len, _ in rows)
    return replace(
        base,
        rows=tuple(rows),
        num_single=sum(q_len == 1 for q_len, _ in rows),
        num_padding_rows=MAX_ROWS - len(rows),
        num_padding_tokens=(MAX_ROWS if max_q_len == 1 else MAX_TOKENS) - num_tokens,
        max_q_len=max_q_len,
        window=window,
    )


@st.composite
def ragged_rows(draw: st.DrawFn, max_q_len: int | None = None, max_len: int = MAX_LEN) -> list[tuple[int, int]]:
    rows, left = [], MAX_TOKENS
    for _ in range(draw(st.integers(1, MAX_ROWS))):
        q_len = draw(st.integers(1, max(1, min(max_q_len or left, left - MAX_ROWS))))
        kv_len = draw(st.one_of(st.just(0), st.integers(min(q_len, max_len), max_len)))
        rows.append((q_len, kv_len))
        left -= q_len
        if left <= MAX_ROWS:
            break
    return rows


@few_examples
@given(rows=ragged_rows(), window=st.sampled_from([0, 1, 3, 10]), seed=st.integers(0, 100))
def test_any_mix_of_rows(call: Callable, rows, window: int, seed: int):
    case = padded(rows, None, window=window)
    inputs = make_inputs(case, seed)
    assert_right(case, inputs, *call(case, inputs))


@few_examples
@given(rows=ragged_rows(max_q_len=4), window=st.sampled_from([0, 1, 3, 10]), seed=st.integers(0, 100))
def test_any_verification(call: Callable, rows, window: int, seed: int):
    case = padded(rows, 4, window=window)
    inputs = make_inputs(case, seed)
    assert_right(case, inputs, *call(case, inputs))


def row_bytes(case: AttentionCase, inputs: AttentionInputs, outputs: np.ndarray, row: int) -> bytes:
    return outputs[inputs.cu_q_lens[row] : inputs.cu_q_lens[row + 1]].tobytes()


def transplant(source: AttentionInputs, row: int, target: AttentionInputs, other: int) -> None:
    """Gives row `other` of `target` the queries, keys, values and context of row `row` of `source`."""
    here, there = (slice(i.cu_q_lens[r], i.cu_q_lens[r + 1]) for i, r in ((target, other), (source, row)))
    for name in ("queries", "keys", "values"):
        getattr(target, name)[here] = getattr(source, name)[there]
    used = -(-int(source.kv_lens[row]) // source.kv_pages.shape[4])
    pages = target.page_indices[other, :used], source.page_indices[row, :used]
    target.kv_pages[:, pages[0]] = source.kv_pages[:, pages[1]]


@few_examples
@given(
    mine=st.tuples(st.integers(2, 9), st.integers(9, 300)),
    rows=ragged_rows(max_q_len=9, max_len=300),
    others=ragged_rows(max_q_len=9, max_len=300),
    max_q_len=st.sampled_from([1, 9, None]),
    window=st.sampled_from([0, 70]),
    seed=st.integers(0, 100),
)
def test_bytes_do_not_depend_on_other_rows(call: Callable, mine, rows, others, max_q_len, window: int, seed: int):
    answers = []
    source = None
    for neighbours in (rows, others):
        last = mine if max_q_len != 1 else (1, mine[1])
        if max_q_len == 1:
            neighbours = [(1, kv_len) for _, kv_len in neighbours]
        kept = neighbours[: MAX_ROWS - 1]
        while sum(q_len for q_len, _ in kept) + last[0] > MAX_TOKENS:
            kept = kept[1:]
        case = padded([*kept, last], max_q_len, LONG, window)
        inputs = make_inputs(case, seed + len(answers))
        row = len(case.rows) - 1
        if source is None:
            source = (inputs, row)
        else:
            transplant(*source, inputs, row)
        outputs, _ = call(case, inputs)
        answers.append(row_bytes(case, inputs, outputs, row))
    assert answers[0] == answers[1]
