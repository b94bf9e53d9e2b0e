"""The kernels of the int8 matmul, compiled for devices that are not here."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import ptxas, toolchain
from pallas_kernels.aot.measure import Measured, measure
from pallas_kernels.aot.programs import Program
from pallas_kernels.aot.targets import target
from pallas_kernels.int8_matmul import gpu

# Decode and prefill at widths of an 8B model, and sizes that fill no block.
PROGRAMS = [
    {"num_rows": rows, "in_features": d, "out_features": f, "quantize_activations": quantize, "out_dtype": out_dtype}
    for quantize in (True, False)
    for rows, d, f, out_dtype in ((1, 4096, 6144, None), (17, 320, 264, "float32"), (200, 352, 1000, None),
                                  (64, 14336, 4096, None), (600, 4096, 4096, None))
]  # fmt: skip
SCANS = [{"num_rows": 16, "num_layers": 4, "quantize_activations": quantize} for quantize in (True, False)]


def compiled(target: str, programs: list[dict], implementation: str) -> list[Measured]:
    platform = "cuda" if target.startswith("h200") else "tpu"
    if toolchain.missing(platform) is not None:
        pytest.skip(str(toolchain.missing(platform)))
    found = measure("int8_matmul", [program | {"implementation": implementation} for program in programs], target)
    assert [each.error for each in found] == [None] * len(found)
    return found


@pytest.mark.parametrize("target", ["v5e:1", "v6e:1", "v5p:1", "tpu7x:1"])
def test_compiles_for_tpus_without_copies(target: str):
    for each in compiled(target, PROGRAMS + SCANS, "tpu"):
        assert each.copies == () and each.memory is not None
        assert each.memory.temporaries < 2**20, "no copy of a layer of the stack either"


def test_compiles_for_hopper_without_spills():
    found = compiled("h200:1", PROGRAMS + SCANS, "gpu")
    kernels = [kernel for each in found for kernel in each.kernels if "mosaic" in kernel.name]
    assert len(kernels) >= len(PROGRAMS)
    assert {kernel.spill_stores + kernel.spill_loads + kernel.stack_frame for kernel in kernels} == {0}
    for each in found[len(PROGRAMS) :]:
        assert each.memory is not None and each.memory.temporaries < 2**20


def compile_converting_in_registers(rows: list[int]) -> None:
    """The job: weight-only in the form that the interpreter does not run."""
    mesh = target("h200:1").mesh()
    for num_rows in rows:
        chosen = gpu.FEW_ROWS if num_rows <= gpu.INSTRUCTION_ROWS else gpu.MANY_ROWS
        blocks = replace(chosen, weights_in_registers=True)
        arguments = (((num_rows, 4096), "bfloat16"), ((1, 4096, 4096), "int8"), ((1, 4096), "float32"), ((1,), "int32"))
        Program(
            "int8_matmul",
            lambda *arrays, blocks=blocks: gpu.tiled_matmul(*arrays, blocks, False, jnp.bfloat16, False),
            tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in arguments),
        ).compile(mesh)


def test_converting_in_registers_compiles_without_spills():
    if toolchain.missing("cuda") is not None:
        pytest.skip(str(toolchain.missing("cuda")))
    job = "tests.pallas_kernels.int8_matmul.test_compiled:compile_converting_in_registers"
    finished = toolchain.run(job, {"rows": [16, 64, 4096]}, "cuda")
    kernels = [kernel for kernel in ptxas.read(finished.log) if "mosaic" in kernel.name]
    assert len(kernels) == 3 and {kernel.spill_stores + kernel.spill_loads for kernel in kernels} == {0}
