"""What every implementation of the int8 matmul provides, and the description of a call it is chosen by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Device, current_device

type Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class Int8MatmulSpec:
    """The static facts of a call. num_rows: all leading axes of x together; D and F of one shard."""

    num_rows: int
    in_features: int
    out_features: int
    quantize_activations: bool
    dtype: Any = jnp.bfloat16
    device: Device = field(default_factory=current_device)
    interpret: bool = False


@dataclass(frozen=True)
class Int8MatmulImplementation:
    """One implementation. `matmul(x [T, D], values i8[F, D], scale f32[F], *, quantize_activations, out_dtype)`."""

    name: str
    automatic: bool
    unsupported_reasons: Callable[[Int8MatmulSpec], list[str]]
    matmul: Callable[..., Array]


def common_reasons(spec: Int8MatmulSpec) -> list[str]:
    """Reasons that hold for every implementation."""
    if not jnp.issubdtype(spec.dtype, jnp.floating):
        return [f"x has dtype {jnp.dtype(spec.dtype).name}, which is not floating point"]
    return []
