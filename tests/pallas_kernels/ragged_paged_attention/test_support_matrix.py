"""The table of the package's README against what the implementations say of the cases that it names."""

import re
from pathlib import Path

import pytest

import pallas_kernels
from pallas_kernels.ragged_paged_attention.api import named
from pallas_kernels.ragged_paged_attention.cases import CASES, KERNEL_ROWS, AttentionCase
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled

README = (Path(pallas_kernels.__file__).parent / "README.md").read_text()
HEADER = "| cases | xla | tpu | gpu |\n"
ROWS = ("kernel_decode", "kernel_verify", "kernel_mixed")
BY_NAME = {case.name: case for case in CASES}


def table() -> dict[str, dict[str, bool]]:
    """Cases (without the kind of their rows) to implementation to whether it serves them."""
    body = README.partition(HEADER)[2].partition("\n\n")[0]
    found = {}
    for line in body.splitlines()[1:]:
        suffix, *cells = re.findall(r"`(\w+)`|\b(yes|no)\b", line)
        found[suffix[0]] = {name: cell[1] == "yes" for name, cell in zip(("xla", "tpu", "gpu"), cells, strict=True)}
    return found


TABLE = table()


def spec_of(case: AttentionCase) -> AttentionSpec:
    return AttentionSpec(
        case.num_kv_heads * case.group, case.num_kv_heads, case.head_dim, case.page_size, case.dtype, case.kv_dtype,
        case.max_q_len, soft_cap=case.soft_cap is not None, sinks=case.sinks, scales=is_scaled(case.kv_dtype),
        interpret=True,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", TABLE)
def test_a_row_says_what_the_implementations_say(suffix: str):
    for rows in ROWS:
        spec = spec_of(BY_NAME[f"{rows}_{suffix}"])
        served = {name: not named(name).unsupported_reasons(spec) for name in TABLE[suffix]}
        assert served == TABLE[suffix], rows


def test_every_case_of_a_kernels_shape_is_in_the_table():
    named_cases = {f"{rows}_{suffix}" for rows in ROWS for suffix in TABLE}
    of_rows = {case.name for case in CASES if case.name.startswith(tuple(f"{rows}_" for rows in ROWS))}
    assert set(ROWS) <= set(KERNEL_ROWS) and named_cases == of_rows
