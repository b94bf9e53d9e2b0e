"""Every implementation against the float64 reference, over the shared cases; kernels in Pallas' interpreters."""

import pytest

from pallas_kernels import Unsupported
from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention.cases import CASES, AttentionCase, make_inputs
from tests.pallas_kernels.interpreters import (
    DMA_MODES,
    DmaMode,
    gpu_interpreter_without_races,
    tpu_interpreter_without_races,
)
from tests.pallas_kernels.ragged_paged_attention.support import assert_right, is_kernel_shape, run

IMPLEMENTATIONS = ("reference", "xla")  # everywhere
SERVED_BY_TPU = [case for case in CASES if is_kernel_shape(case)]
# wgmma multiplies bfloat16
SERVED_BY_GPU = [case for case in CASES if is_kernel_shape(case)
                 and "float32" not in (case.dtype, case.kv_dtype)]  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: AttentionCase, implementation: str):
    inputs = make_inputs(case)
    assert_right(case, inputs, *run(case, inputs, implementation))


# A case takes 2.5 s of a core, nearly all of it to compile the interpreter's program: every fourth runs in both modes.
ON_TPU = [(case, mode) for i, case in enumerate(SERVED_BY_TPU) for mode in DMA_MODES[: 2 if i % 4 == 0 else 1]]


@pytest.mark.parametrize(("case", "dma_mode"), ON_TPU, ids=[f"{case.name}-{mode}" for case, mode in ON_TPU])
def test_case_on_tpu(case: AttentionCase, dma_mode: DmaMode):
    inputs = make_inputs(case)
    with tpu_interpreter_without_races(dma_mode) as interpret:
        assert_right(case, inputs, *run(case, inputs, "tpu", interpret))


@pytest.mark.parametrize("case", [case for case in CASES if case not in SERVED_BY_TPU], ids=lambda case: case.name)
def test_what_tpu_does_not_serve_is_refused(case: AttentionCase):
    inputs = make_inputs(case)
    with tpu_interpreter_without_races() as interpret, pytest.raises(Unsupported):
        run(case, inputs, "tpu", interpret)


# Matrix rows of tokens that are not the unit's, poison among them, are multiplied and dropped; what is kept is checked.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("case", SERVED_BY_GPU, ids=lambda case: case.name)
def test_case_on_gpu(case: AttentionCase):
    inputs = make_inputs(case)
    with gpu_interpreter_without_races() as interpret:
        assert_right(case, inputs, *run(case, inputs, "gpu", interpret))


@pytest.mark.parametrize("case", [case for case in CASES if case not in SERVED_BY_GPU], ids=lambda case: case.name)
def test_what_gpu_does_not_serve_is_refused(case: AttentionCase):
    with pytest.raises(Unsupported):
        run(case, make_inputs(case), "gpu", interpret=True)


def test_every_implementation_is_in_the_suite():
    assert {candidate.name for candidate in api.IMPLEMENTATIONS} == {*IMPLEMENTATIONS, "tpu", "gpu"}
