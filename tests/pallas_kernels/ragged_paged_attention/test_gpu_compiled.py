"""The Hopper kernels compiled for an H200 that is not here: no spills, shared memory that fits, pages in place."""

import pytest

from pallas_kernels.aot import toolchain
from pallas_kernels.aot.measure import measure

# Rows of one query and of a few (rows of many: test_gpu_prefill): every head width with every dtype of the pages, every
# page size, every option for one query and for several; 12 queries of 4 heads are the most columns of decode.
# One row of one kv head: what is split most.
PROGRAMS = [
    {"head_dim": 64, "kv_dtype": "int8", "page_size": 32, "q_len": 5},
    {"head_dim": 64, "page_size": 16, "sinks": True},
    {"head_dim": 64, "page_size": 128, "kv_dtype": "float8_e4m3fn", "soft_cap": 30.0},
    {"head_dim": 128, "page_size": 16, "window": True, "soft_cap": 30.0},
    {"head_dim": 128, "page_size": 64, "num_rows": 1, "num_q_heads": 1, "num_kv_heads": 1},
    {"head_dim": 128, "page_size": 128, "q_len": 12, "kv_dtype": "float8_e4m3fn"},
    {"head_dim": 128, "page_size": 32, "q_len": 4, "kv_dtype": "int8", "sinks": True, "soft_cap": 30.0},
    {"head_dim": 256, "page_size": 256, "q_len": 4},
    {"head_dim": 256, "page_size": 64, "kv_dtype": "int8"},
    {"head_dim": 256, "page_size": 16, "q_len": 4, "kv_dtype": "float8_e4m3fn", "window": True},
]


def test_compiles_for_hopper_without_spills_and_in_place():
    if toolchain.missing("cuda") is not None:
        pytest.skip(str(toolchain.missing("cuda")))
    found = measure("ragged_paged_attention", [program | {"implementation": "gpu"} for program in PROGRAMS], "h200:1")
    assert [each.error for each in found] == [None] * len(found)
    kernels = [kernel for each in found for kernel in each.kernels if "mosaic" in kernel.name]
    assert len(kernels) >= 2 * len(PROGRAMS)
    assert {kernel.spill_stores + kernel.spill_loads + kernel.stack_frame for kernel in kernels} == {0}
    for each in found:
        assert each.copies == () and each.memory is not None
        assert each.memory.aliased > 0
