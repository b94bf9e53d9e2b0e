"""int8 weights times floating point activations: one contract for every back end.

Letters: T rows of x, D in features, F out features. Weights are `i8[F, D]` (K-contiguous): Hopper cannot transpose
8-bit operands, XLA:CPU is faster with it, and TPUs do not mind.
"""

import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.int8_matmul import reference, xla
from pallas_kernels.int8_matmul.contract import Array, Int8MatmulImplementation, Int8MatmulSpec

OPERATION = "int8_matmul"
IMPLEMENTATIONS: tuple[Int8MatmulImplementation, ...] = (xla.IMPLEMENTATION, reference.IMPLEMENTATION)


def resolve(spec: Int8MatmulSpec, implementation: str | None = None) -> str:
    """The name of the implementation that serves `spec`; raises Unsupported or ValueError as `int8_matmul`."""
    return dispatch.choose(OPERATION, IMPLEMENTATIONS, spec, implementation).name


def explain(spec: Int8MatmulSpec) -> tuple[dispatch.Verdict, ...]:
    """One line an implementation: chosen or not, and why not."""
    return dispatch.explain(IMPLEMENTATIONS, spec)


def int8_matmul(
    x: Array,
    values: Array,
    scale: Array,
    *,
    quantize_activations: bool,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """x times the transpose of a quantised weight, `x @ (values * scale).T`.

    Args:
      x: [..., D], floating point.
      values: i8[F, D].
      scale: f32[F] or f32[F, 1].
      quantize_activations: quantise x too, with a scale a token of absmax / 127 computed here; products are then exact
        integers. False keeps x (an implementation may hold it in no less than 15 bits below each row's largest value)
        and sums in float32. All-zero rows give zeros.
      out_dtype: of the result; that of x when None.
      implementation: a name, or None for the first that supports the call.

    Returns:
      [..., F].

    Raises:
      Unsupported: with every reason.
      ValueError: shapes or the weight's dtype do not fit, or an unknown implementation.
    """
    out_features, in_features = values.shape
    if x.shape[-1] != in_features or math.prod(scale.shape) != out_features:
        raise ValueError(f"x {x.shape}, values {values.shape} and scale {scale.shape} do not fit together")
    if values.dtype != jnp.int8:
        raise ValueError(f"values have dtype {values.dtype}, expected int8")
    leading = x.shape[:-1]
    num_rows = math.prod(leading)
    spec = Int8MatmulSpec(num_rows, in_features, out_features, quantize_activations, x.dtype)
    chosen = dispatch.choose(OPERATION, IMPLEMENTATIONS, spec, implementation)
    result = chosen.matmul(
        x.reshape(num_rows, in_features),
        values,
        scale.reshape(out_features),
        quantize_activations=quantize_activations,
        out_dtype=x.dtype if out_dtype is None else out_dtype,
    )
    return result.reshape(*leading, out_features)


def quantize_weight(weight: Array) -> tuple[Array, Array]:
    """Symmetric quantisation a channel: weight [F, D] to (values i8[F, D] in -127..127, scale f32[F, 1]).

    A channel of zeros gets scale 0. Runs on the device of `weight`, also inside jit.
    """
    weight = jnp.asarray(weight, jnp.float32)
    scale = jnp.abs(weight).max(axis=1, keepdims=True) / 127
    return jnp.rint(weight / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale
