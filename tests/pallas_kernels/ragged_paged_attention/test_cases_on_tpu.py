"""The TPU kernels against the float64 reference, over the shared cases, in Pallas' interpreter."""

import pytest

from pallas_kernels import Unsupported
from pallas_kernels.ragged_paged_attention.cases import CASES, AttentionCase, make_inputs
from tests.pallas_kernels.interpreters import DMA_MODES, DmaMode, tpu_interpreter_without_races
from tests.pallas_kernels.ragged_paged_attention.support import (
    SMOKE,
    assert_right,
    for_interpreters,
    is_kernel_shape,
    run,
)

SERVED = [case for case in CASES if is_kernel_shape(case)]
RUN = for_interpreters(SERVED)
# A case takes 2.5 s of a core and more, most of it to compile the interpreter's program: every fourth in both modes.
WANTED = [(case, mode) for i, case in enumerate(RUN) for mode in DMA_MODES[: 2 if i % 4 == 0 else 1]]


@pytest.mark.parametrize(
    ("case", "dma_mode"),
    [pytest.param(case, mode, id=f"{case.name}-{mode}", marks=SMOKE.get(case.name, ())) for case, mode in WANTED],
)
def test_case(case: AttentionCase, dma_mode: DmaMode):
    inputs = make_inputs(case)
    with tpu_interpreter_without_races(dma_mode) as interpret:
        assert_right(case, inputs, *run(case, inputs, "tpu", interpret))


@pytest.mark.parametrize("case", [case for case in CASES if case not in SERVED], ids=lambda case: case.name)
def test_what_is_not_served_is_refused(case: AttentionCase):
    inputs = make_inputs(case)
    with tpu_interpreter_without_races() as interpret, pytest.raises(Unsupported):
        run(case, inputs, "tpu", interpret)
