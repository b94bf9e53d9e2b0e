"""What every implementation of the int8 matmul provides, and the description of a call it is chosen by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Device, current_device, no_reasons

type Array = jax.Array | np.ndarray

# Floor of a row's largest absolute value: a row of zeros then has a scale and quotients of 0 without a case of its own,
# and 127 / largest stays finite in float32.
SMALLEST_MAXIMUM = 1e-30


@dataclass(frozen=True)
class Int8MatmulSpec:
    """The static facts of a call. num_rows: all leading axes of x together; D and F of one shard.

    stacked: the weight is a stack of all layers with a layer index. dtype: of x. traced: inside a compiled program.
    """

    num_rows: int
    in_features: int
    out_features: int
    quantize_activations: bool
    dtype: Any = jnp.bfloat16
    device: Device = field(default_factory=current_device)
    interpret: bool = False
    stacked: bool = False
    traced: bool = False


@dataclass(frozen=True)
class Int8MatmulImplementation:
    """One implementation.

    matmul: `(x [T, D], values i8[L, F, D], scale f32[L, F], layer i32[1], *, quantize_activations, out_dtype,
      interpret)` to [T, F]; T is at least 1.
    """

    name: str
    automatic: bool
    unsupported_reasons: Callable[[Int8MatmulSpec], list[str]]
    matmul: Callable[..., Array]
    yielding_reasons: Callable[[Int8MatmulSpec], list[str]] = no_reasons


def common_reasons(spec: Int8MatmulSpec) -> list[str]:
    """Reasons that hold for every implementation."""
    if not jnp.issubdtype(spec.dtype, jnp.floating):
        return [f"x has dtype {jnp.dtype(spec.dtype).name}, which is not floating point"]
    return []
