"""int8 weights times floating point activations: one contract for every back end.

Letters: T rows of x, D in features, F out features, L layers. Weights are `i8[F, D]` (K-contiguous): Hopper cannot
transpose 8-bit operands, XLA:CPU is faster with it, and TPUs do not mind.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels import dispatch
from pallas_kernels.int8_matmul import gpu, reference, tpu, xla
from pallas_kernels.int8_matmul.contract import Array, Int8MatmulImplementation, Int8MatmulSpec

OPERATION = "int8_matmul"
# First supported that does not yield wins; the reference serves only callers who name it.
IMPLEMENTATIONS: tuple[Int8MatmulImplementation, ...] = (
    tpu.IMPLEMENTATION,
    gpu.IMPLEMENTATION,
    xla.IMPLEMENTATION,
    reference.IMPLEMENTATION,
)


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
    layer: Array | int | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> Array:
    """x times the transpose of a quantised weight, `x @ (values * scale).T`.

    Args:
      x: [..., D], floating point.
      values: i8[F, D], or i8[L, F, D] with `layer`.
      scale: f32[F] or f32[F, 1], or f32[L, F] or f32[L, F, 1] with `layer`.
      quantize_activations: quantise x too, with a scale a token of absmax * (1 / 127) computed here, quotients of
        x * (127 / absmax) rounded to nearest even; the products are then exact integers, scaled in float32, first by
        token, then by feature. False keeps x (an implementation may hold it in no less than 15 bits below each row's
        largest value) and sums in float32. All-zero rows give zeros.
      out_dtype: of the result; that of x when None.
      layer: i32[] or i32[1], may be traced: which weight of a stack. In a loop over layers pass the stack and the
        index: a kernel's operand that is a slice of a stack is copied first.
      implementation: a name, or None for the first that supports the call and does not yield to a faster one.
      interpret: parameters of Pallas' interpreter (`pltpu.InterpretParams`, `plgpu.InterpretGPUParams`), with which the
        named kernel runs on any device; slow, for tests.

    Returns:
      [..., F].

    Raises:
      Unsupported: with every reason.
      ValueError: shapes or the weight's dtype do not fit, or an unknown implementation.
    """
    stacked = layer is not None
    check_arguments(x, values, scale, stacked)
    if not stacked:
        values, scale, layer = values[None], scale[None], 0
    num_layers, out_features, in_features = values.shape
    leading = x.shape[:-1]
    num_rows = math.prod(leading)
    spec = Int8MatmulSpec(num_rows, in_features, out_features, quantize_activations, x.dtype, interpret=bool(interpret),
                          stacked=stacked, traced=isinstance(x, Tracer))  # fmt: skip
    chosen = dispatch.choose(OPERATION, IMPLEMENTATIONS, spec, implementation)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not num_rows:
        return jnp.zeros((*leading, out_features), out_dtype)
    result = chosen.matmul(
        x.reshape(num_rows, in_features),
        values,
        scale.reshape(num_layers, out_features),
        np.asarray(layer, np.int32).reshape(1) if isinstance(layer, int) else layer.astype(jnp.int32).reshape(1),
        quantize_activations=quantize_activations,
        out_dtype=out_dtype,
        interpret=interpret,
    )
    return result.reshape(*leading, out_features)


def check_arguments(x: Array, values: Array, scale: Array, stacked: bool) -> None:
    """Raises ValueError naming what does not fit."""
    rank = 3 if stacked else 2
    if values.ndim != rank:
        raise ValueError(
            f"values has shape {values.shape}, expected {rank} axes {'with' if stacked else 'without'} layer"
        )
    if x.shape[-1:] != values.shape[-1:] or math.prod(scale.shape) != math.prod(values.shape[:-1]):
        raise ValueError(f"x {x.shape}, values {values.shape} and scale {scale.shape} do not fit together")
    if values.dtype != jnp.int8:
        raise ValueError(f"values have dtype {values.dtype}, expected int8")


def quantize_weight(weight: Array) -> tuple[Array, Array]:
    """Symmetric quantisation a channel: weight [F, D] to (values i8[F, D] in -127..127, scale f32[F, 1]).

    A channel of zeros gets scale 0. Runs on the device of `weight`, also inside jit.
    """
    weight = jnp.asarray(weight, jnp.float32)
    scale = jnp.abs(weight).max(axis=1, keepdims=True) / 127
    return jnp.rint(weight / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale
