"""Every implementation of the int8 matmul against exact integers and float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Unsupported
from pallas_kernels.int8_matmul import Int8MatmulSpec, api, explain, int8_matmul, quantize_weight, reference, resolve
from pallas_kernels.int8_matmul.cases import CASES, Int8MatmulCase, make_inputs

IMPLEMENTATIONS = ("reference", "xla")  # "tpu" and "gpu" join here

# Largest error of a row relative to its largest component, by the dtypes of x and of the result. bfloat16 results
# round by 2^-9 = 0.2 %; bfloat16 x may be held in 15 bits below its largest value (xla on a CPU); float32 sums of up
# to 4096 products stay near 1e-6.
TOLERANCE = {
    ("float32", "float32"): 1e-5,
    ("bfloat16", "float32"): 3e-4,
    ("bfloat16", "bfloat16"): 4e-3,
}


def run(case: Int8MatmulCase, quantize_activations: bool, implementation: str) -> np.ndarray:
    call = partial(int8_matmul, quantize_activations=quantize_activations, out_dtype=case.out_dtype,
                   implementation=implementation)  # fmt: skip
    if implementation == "reference":
        return np.asarray(call(*make_inputs(case)))
    return np.asarray(jax.jit(call)(*(jnp.asarray(argument) for argument in make_inputs(case))))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("quantize_activations", [False, True], ids=["weight_only", "weights_and_activations"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Int8MatmulCase, quantize_activations: bool, implementation: str):
    x, values, scale = make_inputs(case)
    rows = x.reshape(-1, case.in_features)
    wanted = reference.matmul(rows, values, scale.reshape(-1), quantize_activations=quantize_activations,
                              out_dtype=np.float64)  # fmt: skip
    result = run(case, quantize_activations, implementation)
    out_dtype = case.out_dtype or case.dtype
    assert result.shape == (*case.leading, case.out_features) and result.dtype == jnp.dtype(out_dtype)
    result = result.astype(np.float64).reshape(wanted.shape)
    assert np.isfinite(result).all()
    error = np.abs(result - wanted).max(axis=1, initial=0) / np.maximum(np.abs(wanted).max(axis=1, initial=0), 1e-30)
    assert error.max(initial=0) <= TOLERANCE[case.dtype, out_dtype]
    assert (result[: case.zero_rows] == 0).all() and (result[:, 0] == 0).all()


def test_quantised_activations_are_close_to_the_unquantised_product():
    """int8 activations keep about 7 bits: 2 % of a row's largest output for normal data."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(16, 512)).astype(np.float32), rng.normal(size=(64, 512)).astype(np.float32)
    values, scale = quantize_weight(jnp.asarray(weight))
    result = int8_matmul(jnp.asarray(x), values, scale, quantize_activations=True)
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.abs(result - wanted).max() / np.abs(wanted).max() < 0.02


def test_quantize_weight():
    weight = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    weight[2] = 0
    values, scale = (np.asarray(x) for x in quantize_weight(jnp.asarray(weight)))
    assert values.dtype == np.int8 and values.shape == (6, 40) and scale.dtype == np.float32 and scale.shape == (6, 1)
    assert (np.abs(values).max(axis=1) == [127, 127, 0, 127, 127, 127]).all()
    assert (np.abs(values * scale - weight) <= scale * 0.5001).all()


def test_wrong_arguments_are_refused():
    x, values, scale = (jnp.asarray(argument) for argument in make_inputs(CASES[0]))
    with pytest.raises(ValueError, match="do not fit together"):
        int8_matmul(x[:, 1:], values, scale, quantize_activations=False)
    with pytest.raises(ValueError, match="expected int8"):
        int8_matmul(x, values.astype(jnp.int32), scale, quantize_activations=False)
    with pytest.raises(Unsupported, match="not floating point"):
        int8_matmul(x.astype(jnp.int32), values, scale, quantize_activations=False)
    with pytest.raises(ValueError, match="'triton' is not one of"):
        int8_matmul(x, values, scale, quantize_activations=False, implementation="triton")


def test_choice_and_suite():
    spec = Int8MatmulSpec(num_rows=8, in_features=64, out_features=48, quantize_activations=True)
    assert resolve(spec) == "xla" and resolve(spec, "reference") == "reference"
    assert [verdict.chosen for verdict in explain(spec)] == [True, False]
    assert {candidate.name for candidate in api.IMPLEMENTATIONS} == set(IMPLEMENTATIONS)
