"""Every kernel of ragged paged attention, compiled for the devices it says it serves: it fits and copies no pages.

Runs where the compilers are (`make aot-packages`). One process a target compiles all programs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import measure, toolchain
from pallas_kernels.aot.programs import Program, ragged_paged_attention
from pallas_kernels.aot.targets import target
from pallas_kernels.dispatch import Device
from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled

KERNELS = {"tpu": ("v5e:1", "v6e:1")}
"""Implementations that are kernels, and the devices in question; XLA's form is not one."""
NUM_LAYERS = 2
"""The default of the program."""
OURS = ("ragged_paged_attention", "attend_many", "write_new_kv")
"""Kernels; everything else in a program is XLA's."""
MAX_SPILLING = 0.05
EVERYTHING = {"window": True, "soft_cap": 30.0, "sinks": True}
PROGRAMS = [
    {"page_size": 16},
    {"page_size": 128, "kv_dtype": "int8", **EVERYTHING},
    {"head_dim": 64, "page_size": 64},
    {"head_dim": 256, "page_size": 32, "num_q_heads": 8, "num_kv_heads": 8},
    {"page_size": 64, "kv_dtype": "float8_e4m3fn", "num_q_heads": 8, "num_kv_heads": 1},
    {"page_size": 64, "q_len": 5, "num_rows": 16},
    {"page_size": 64, "q_len": 256, "num_rows": 2, "max_context": 4096},
    {"page_size": 16, "q_len": 256, "num_rows": 2, "max_context": 4096, "kv_dtype": "int8", **EVERYTHING},
    {"page_size": 32, "q_len": 256, "num_rows": 2, "max_context": 4096, "head_dim": 256, "kv_dtype": "float8_e4m3fn"},
]
"""Decode, verification (k + 1 = 5 queries a row) and prefill, over head widths, page sizes, page dtypes and options."""


def registered() -> list[tuple[str, str]]:
    names = [each.name for each in api.IMPLEMENTATIONS]
    return [(name, where) for name, targets in KERNELS.items() if name in names for where in targets]


def reasons(implementation: str, where: str, program: dict) -> list[str]:
    """Why the implementation refuses a program on a target."""
    platform = {"tpu": "tpu", "cuda": "gpu"}[target(where).platform]
    known = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16, "kv_dtype": "bfloat16"} | program
    fields = {field.name for field in dataclasses.fields(AttentionSpec)}
    spec = AttentionSpec(
        **{name: value for name, value in known.items() if name in fields and name not in ("soft_cap", "sinks")},
        soft_cap="soft_cap" in program, sinks="sinks" in program, scales=is_scaled(known["kv_dtype"]),
        max_q_len=program.get("q_len", 1), device=Device(platform, target(where).chip.kind),
    )  # fmt: skip
    return api.named(implementation).unsupported_reasons(spec)


@functools.cache
def compiled(implementation: str, where: str) -> list[measure.Measured]:
    """All programs the implementation serves on the target."""
    reason = toolchain.missing(target(where).platform)
    if reason is not None:
        pytest.skip(reason)
    programs = [each for each in PROGRAMS if not reasons(implementation, where, each)]
    wanted = [{**each, "implementation": implementation} for each in programs]
    return measure.measure("ragged_paged_attention", wanted, where)


@pytest.fixture(params=registered(), ids="-".join)
def found(request) -> list[measure.Measured]:
    return compiled(*request.param)


def page_bytes(arguments: dict) -> int:
    """The donated argument of the program."""
    pages = ragged_paged_attention(**arguments).arguments[3]
    return math.prod(pages.shape) * jnp.dtype(pages.dtype).itemsize


def test_kernels_serve_decode_verification_and_prefill(found):
    assert {each.arguments.get("q_len", 1) for each in found} == {1, 5, 256}


def test_every_program_compiles(found):
    assert [each.error for each in found if each.error] == []


def test_donated_pages_are_written_in_place(found):
    for each in found:
        assert each.memory is not None and each.memory.aliased == page_bytes(each.arguments)


def test_nothing_of_the_size_of_pages_is_copied(found):
    for each in found:
        layer = page_bytes(each.arguments) // NUM_LAYERS
        assert [copy for copy in each.copies if copy.num_bytes >= layer] == [], each.arguments


def test_temporaries_are_of_the_size_of_queries_and_not_of_pages(found):
    for each in found:
        program = ragged_paged_attention(**each.arguments)
        queries = math.prod(program.arguments[0].shape) * 2
        # Queries and outputs in the kernels' layouts, the work list, and partial results of long rows in float32.
        assert each.memory is not None and each.memory.temporaries <= 8 * queries + (2 << 20), each.arguments


def test_hot_loops_hardly_spill(found):
    for each in found:
        loops = [loop for loop in each.loops if loop.kernel.startswith(OURS)]
        assert [loop for loop in loops if loop.loop_spilling > MAX_SPILLING] == [], each.arguments
    assert any(loop.kernel.startswith(OURS) for each in found for loop in each.loops)


def compile_oversized(target_name: str) -> str:
    """The job: decode with blocks far over VMEM; the compiler's message."""
    from pallas_kernels.ragged_paged_attention import tpu
    from pallas_kernels.ragged_paged_attention.tpu_decode import DecodeBlocks

    program = ragged_paged_attention(page_size=128, max_context=8192, num_rows=4, implementation="tpu")
    queries, keys, values, pages, layer, *rows = program.arguments

    def step(*arguments):
        return tpu.attend(*arguments, scale=0.1, max_q_len=1, blocks=DecodeBlocks(kv=8192, depth=8))

    oversized = Program("oversized", step, (queries, keys, values, pages, layer, *rows))
    try:
        oversized.compile(target(target_name).mesh())
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return "compiled"


@pytest.mark.skipif(toolchain.missing("tpu") is not None, reason=str(toolchain.missing("tpu")))
def test_blocks_that_do_not_fit_are_an_error_of_the_compiler():
    job = "tests.pallas_kernels.aot.test_attention_compiled:compile_oversized"
    message = toolchain.run(job, {"target_name": "v5e:1"}, "tpu").value
    assert "vmem" in message.lower() and "exceed" in message.lower(), message
