"""The one seam of every projection: float or quantised weights, with or without low-rank adapters."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxinfer.errors import InvalidConfig
from pallas_kernels.dispatch import current_device
from pallas_kernels.int8_matmul import int8_matmul


@flax.struct.dataclass
class QuantizedWeight:
    """A projection in few bits, stored [F, D] (output features first).

    values: int8[F, D]. scale: f32[F, groups], groups of equal size along D; int8 has one. zero: like scale, or None.
    format: "int8" (weights only) or "int8_dynamic" (activations quantised per token in the kernel too).
    layer: i32[], which entry of stacks [L, ...] of all these is meant; None where there is no stack. A kernel takes
    stack and index, since a slice that is its operand would be copied first.
    implementation: of the int8 matmul, by name; None takes the one that is chosen for each call.
    """

    values: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    format: str = flax.struct.field(pytree_node=False, default="int8")
    implementation: str | None = flax.struct.field(pytree_node=False, default=None)
    layer: jax.Array | None = None


@flax.struct.dataclass
class Adapters:
    """A stack of A low-rank adapters of one projection: down [A, D, r], up [A, r, F], scale folded into up."""

    down: jax.Array
    up: jax.Array


def linear(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    adapter: Adapters | None = None,
    rows: jax.Array | None = None,
    *,
    out_dtype: Any = None,
) -> jax.Array:
    """`x` [T, D] times `weight`, accumulated in float32.

    Args:
      x: float [T, D].
      weight: [D, F] in the dtype of `x`, or a QuantizedWeight of values [F, D].
      adapter: low-rank adapters, added to the product.
      rows: i32[T], the adapter of each token, -1 for none.
      out_dtype: dtype of the result; that of `x` when None.

    Returns:
      [T, F].
    """
    wanted = out_dtype or x.dtype
    low = None if adapter is None or rows is None else adapted(x, adapter, rows)
    if isinstance(weight, QuantizedWeight):
        y = quantized_matmul(x, weight, wanted if low is None else jnp.float32)
    else:
        y = matmul(x, weight)
    y = y if low is None else y + low
    return y.astype(wanted)


def out_features(weight: jax.Array | QuantizedWeight) -> int:
    """F of a weight, or of one layer's in a stack."""
    return weight.values.shape[-2] if isinstance(weight, QuantizedWeight) else weight.shape[-1]


def matmul(x: jax.Array, weight: jax.Array, *, transposed: bool = False) -> jax.Array:
    """f32[T, F] of x [T, D] and weight [D, F] (or [F, D] when transposed)."""
    # XLA:CPU runs a one-row bfloat16 product in a naive loop at about 1 GB/s; two rows are 6 to 18 times faster.
    # In float32 one row is a fast matrix-vector product, and two would cost more.
    pad = x.shape[0] == 1 and x.dtype != jnp.float32 and current_device().platform == "cpu"
    x = jnp.concatenate([x, x]) if pad else x
    y = jnp.einsum("td,fd->tf" if transposed else "td,df->tf", x, weight, preferred_element_type=jnp.float32)
    return y[:1] if pad else y


def quantized_matmul(x: jax.Array, weight: QuantizedWeight, out_dtype: Any) -> jax.Array:
    """[T, F] through `pallas_kernels.int8_matmul`, whose kernels round sums of float32 as they store them: a float32
    result would be written, read and rounded once more. Raises InvalidConfig for a format it does not know.
    """
    if weight.format not in ("int8", "int8_dynamic") or weight.zero is not None:
        raise InvalidConfig("quantization", f"{weight.format!r} is not int8 or int8_dynamic without zero points")
    dynamic = weight.format == "int8_dynamic"
    y = int8_matmul(
        x, weight.values, weight.scale, quantize_activations=dynamic, out_dtype=out_dtype, layer=weight.layer,
        implementation=weight.implementation,
    )  # fmt: skip
    return jnp.asarray(y)


def adapted(x: jax.Array, adapter: Adapters, rows: jax.Array) -> jax.Array:
    """f32[T, F]: every adapter's down projection in one product, masked to each token's own, then all ups in one
    product.

    With few adapters of small rank the A-fold waste costs less than gathering [T, D, r] weights.
    """
    num_adapters, width, rank = adapter.down.shape
    down = adapter.down.transpose(1, 0, 2).reshape(width, num_adapters * rank)
    own = rows[:, None] == jnp.arange(num_adapters)
    low = matmul(x, down).reshape(-1, num_adapters, rank) * own[..., None]
    up = adapter.up.reshape(num_adapters * rank, -1)
    return matmul(low.reshape(-1, num_adapters * rank).astype(x.dtype), up)
