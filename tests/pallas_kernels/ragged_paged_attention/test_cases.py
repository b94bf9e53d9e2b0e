"""What runs everywhere against the float64 reference, over the shared cases. The kernels' are in `test_cases_on_tpu`
and `test_cases_on_gpu`, in Pallas' interpreters: files of their own, so that processes can share the work.
"""

import pytest

from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention.cases import CASES, AttentionCase, make_inputs
from tests.pallas_kernels.ragged_paged_attention.support import assert_right, run

IMPLEMENTATIONS = ("reference", "xla")
IN_INTERPRETERS = ("tpu", "gpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: AttentionCase, implementation: str):
    inputs = make_inputs(case)
    assert_right(case, inputs, *run(case, inputs, implementation))


def test_every_implementation_is_in_the_suite():
    assert {candidate.name for candidate in api.IMPLEMENTATIONS} == {*IMPLEMENTATIONS, *IN_INTERPRETERS}
