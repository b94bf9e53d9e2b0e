"""The Hopper kernels against the float64 reference, over the shared cases, in Pallas' interpreter."""

import pytest

from pallas_kernels import Unsupported
from pallas_kernels.ragged_paged_attention.cases import CASES, AttentionCase, make_inputs
from tests.pallas_kernels.interpreters import gpu_interpreter_without_races
from tests.pallas_kernels.ragged_paged_attention.support import (
    SMOKE,
    assert_right,
    for_interpreters,
    is_kernel_shape,
    run,
)

# wgmma multiplies bfloat16
SERVED = [case for case in CASES if is_kernel_shape(case) and "float32" not in (case.dtype, case.kv_dtype)]


# Matrix rows of tokens that are not the unit's, poison among them, are multiplied and dropped; what is kept is checked.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=SMOKE.get(case.name, ())) for case in for_interpreters(SERVED)]
)
def test_case(case: AttentionCase):
    inputs = make_inputs(case)
    with gpu_interpreter_without_races() as interpret:
        assert_right(case, inputs, *run(case, inputs, "gpu", interpret))


@pytest.mark.parametrize("case", [case for case in CASES if case not in SERVED], ids=lambda case: case.name)
def test_what_is_not_served_is_refused(case: AttentionCase):
    with pytest.raises(Unsupported):
        run(case, make_inputs(case), "gpu", interpret=True)
