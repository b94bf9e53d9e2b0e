"""The definition of the int8 matmul in NumPy: float64, and exact integers where activations are quantised.

Slow, needs concrete arrays and is never chosen unless named.
"""

import numpy as np

from pallas_kernels.int8_matmul.contract import Array, Int8MatmulImplementation, common_reasons


def matmul(x: Array, values: Array, scale: Array, *, quantize_activations: bool, out_dtype) -> np.ndarray:
    weight, scale = np.asarray(values).astype(np.int64), np.asarray(scale).astype(np.float64)
    x = np.asarray(x)
    if not quantize_activations:
        return (x.astype(np.float64) @ weight.T.astype(np.float64) * scale).astype(out_dtype)
    # The quotients are rounded as the other implementations round them, in float32: a half-way case must not differ.
    rows = x.astype(np.float32)
    x_scale = np.abs(rows).max(axis=-1, keepdims=True) / np.float32(127)
    quantized = np.rint(rows / np.where(x_scale > 0, x_scale, np.float32(1))).astype(np.int64)
    return ((quantized @ weight.T) * x_scale.astype(np.float64) * scale).astype(out_dtype)


IMPLEMENTATION = Int8MatmulImplementation("reference", False, common_reasons, matmul)
