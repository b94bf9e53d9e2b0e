"""Kernels for inference with JAX: one contract an operation, an implementation for each kind of device.

Usable alone: needs jax and numpy.
"""

from pallas_kernels import dispatch, int8_matmul, ragged_paged_attention
from pallas_kernels.dispatch import Unsupported

__all__ = ["Unsupported", "dispatch", "int8_matmul", "ragged_paged_attention"]
