"""The definition of the int8 matmul in NumPy: float64, and exact integers where activations are quantised.

Slow, needs concrete arrays and is never chosen unless named.
"""

import numpy as np

from pallas_kernels.dispatch import host_reasons
from pallas_kernels.int8_matmul.contract import (
    SMALLEST_MAXIMUM,
    Array,
    Int8MatmulImplementation,
    Int8MatmulSpec,
    common_reasons,
)


def matmul(
    x: Array, values: Array, scale: Array, layer: Array, *, quantize_activations: bool, out_dtype, interpret=False
) -> np.ndarray:
    index = int(np.asarray(layer)[0])
    weight, scale = np.asarray(values)[index].astype(np.int64), np.asarray(scale)[index].astype(np.float64)
    x = np.asarray(x)
    if not quantize_activations:
        return (x.astype(np.float64) @ weight.T.astype(np.float64) * scale).astype(out_dtype)
    quantized, x_scale = quantize_rows(x)
    return ((quantized.astype(np.int64) @ weight.T) * x_scale.astype(np.float64) * scale).astype(out_dtype)


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i8[T, D], f32[T, 1]) in float32 throughout, as every implementation does it: a half-way case must not differ."""
    x = x.astype(np.float32)
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(SMALLEST_MAXIMUM))
    return np.rint(x * (np.float32(127) / largest)).astype(np.int8), largest * np.float32(1 / 127)


def unsupported_reasons(spec: Int8MatmulSpec) -> list[str]:
    return common_reasons(spec) + host_reasons(spec.traced)


IMPLEMENTATION = Int8MatmulImplementation("reference", False, unsupported_reasons, matmul)
