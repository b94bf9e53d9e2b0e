"""The seam of all projections: float, quantised, adapted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import InvalidConfig
from jaxinfer.linear import Adapters, QuantizedWeight, linear, matmul, out_features
from pallas_kernels.int8_matmul import quantize_weight


def normal(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_summed_in_float32(num_tokens, dtype):
    x, weight = normal(0, num_tokens, 96, dtype=dtype), normal(1, 96, 40, dtype=dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    y = linear(x, weight, out_dtype=jnp.float32)
    assert y.shape == (num_tokens, 40) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, atol=1e-4)
    assert linear(x, weight).dtype == dtype
    np.testing.assert_allclose(matmul(x, weight.T, transposed=True), exact, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a rule for CPUs")
def test_a_cpu_never_multiplies_one_bfloat16_row():
    """One row would run at about 1 GB/s. In float32 one row is the fast case and stays."""
    for dtype, rows in ((jnp.bfloat16, 2), (jnp.float32, 1)):
        x, weight = normal(0, 1, 64, dtype=dtype), normal(1, 64, 128, dtype=dtype)
        assert f"{rows}x128" in jax.jit(linear).lower(x, weight).as_text()


@pytest.mark.parametrize(("format_", "error"), [("int8", 0.02), ("int8_dynamic", 0.03)])
def test_quantised_weights_go_through_the_int8_kernel(format_, error):
    x, weight = normal(0, 5, 96), normal(1, 96, 40)
    values, scale = map(jnp.asarray, quantize_weight(weight.T))
    quantised = QuantizedWeight(values, scale, format=format_)
    assert out_features(quantised) == out_features(weight) == 40
    exact = linear(x, weight)
    found = jax.jit(linear)(x, quantised)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < error


def test_an_unknown_format_is_refused():
    weight = QuantizedWeight(jnp.zeros((4, 8), jnp.int8), jnp.ones((4, 1)), format="fp4")
    with pytest.raises(InvalidConfig, match="fp4"):
        linear(jnp.ones((2, 8)), weight)


def test_each_token_gets_its_own_adapter_and_minus_one_gets_none():
    x, weight = normal(0, 4, 32), normal(1, 32, 24)
    adapter = Adapters(normal(2, 3, 32, 2), normal(3, 3, 2, 24))
    rows = jnp.array([2, -1, 0, 2])
    found = linear(x, weight, adapter, rows)
    expected = np.array(x @ weight)
    for token, row in enumerate(rows.tolist()):
        if row >= 0:
            expected[token] += x[token] @ adapter.down[row] @ adapter.up[row]
    np.testing.assert_allclose(found, expected, atol=1e-4)
