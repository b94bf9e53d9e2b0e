"""The int8 matmul in plain XLA, the contraction over the last axis of both operands."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.int8_matmul.contract import SMALLEST_MAXIMUM, Int8MatmulImplementation, common_reasons

LAST_WITH_LAST = (((1,), (1,)), ((), ()))
# The remainder of rounding is at most 1/2: times 254 it fills an int8 again.
DIGIT_BASE = 254.0


def matmul(
    x: Array, values: Array, scale: Array, layer: Array, *, quantize_activations: bool, out_dtype, interpret=False
) -> Array:
    """See `contract.Int8MatmulImplementation`. The layer's slice fuses into the matmul where its index is static, and
    on TPUs also where it is traced; a traced one on a GPU copies the layer's weight.
    """
    values, scale = one_layer(values, layer), one_layer(scale, layer)
    if quantize_activations:
        result = lax.platform_dependent(x, values, cpu=quantized_two_rows, default=quantized)
    else:
        result = lax.platform_dependent(x, values, cpu=weight_only_in_digits, default=weight_only)
    return (result * scale).astype(out_dtype)


def one_layer(stack: Array, layer: Array) -> Array:
    return stack[0] if stack.shape[0] == 1 else lax.dynamic_index_in_dim(stack, layer[0], keepdims=False)


def quantized(x: Array, values: Array) -> Array:
    integers, x_scale = quantize_rows(x)
    return integer_products(integers, values).astype(jnp.float32) * x_scale


def quantized_two_rows(x: Array, values: Array) -> Array:
    """XLA:CPU runs a one-row int8 matmul in a naive loop, 10 times slower than two rows."""
    num_rows = x.shape[0]
    return quantized(jnp.pad(x, ((0, 1 if num_rows == 1 else 0), (0, 0))), values)[:num_rows]


def weight_only(x: Array, values: Array) -> Array:
    """The conversion of the weight fuses into the matmul on TPUs and GPUs."""
    return lax.dot_general(x, values.astype(x.dtype), LAST_WITH_LAST, preferred_element_type=jnp.float32)


def weight_only_in_digits(x: Array, values: Array) -> Array:
    """x as a sum of int8 digits, all of them multiplied in one exact int8 matmul.

    XLA:CPU would convert the whole weight first: 4 to 8 times slower than this for 1 to 8 rows of D 2048, F 8192, and
    still slower at 64. Two digits hold 15 bits below a row's largest value, more than bfloat16 has; float32 gets three.
    """
    num_rows = x.shape[0]
    first, x_scale = quantize_rows(x)
    rest = x.astype(jnp.float32) / x_scale
    digits, digit = [], first.astype(jnp.float32)
    for _ in range(3 if x.dtype == jnp.float32 else 2):
        digits.append(digit)
        rest = (rest - digit) * DIGIT_BASE
        digit = jnp.rint(rest)
    products = integer_products(jnp.concatenate(digits).astype(jnp.int8), values).astype(jnp.float32)
    by_digit = products.reshape(len(digits), num_rows, values.shape[0])
    total = by_digit[-1]
    for product in by_digit[-2::-1]:
        total = product + total / DIGIT_BASE
    return total * x_scale


def integer_products(integers: Array, values: Array) -> Array:
    return lax.dot_general(integers, values, LAST_WITH_LAST, preferred_element_type=jnp.int32)


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """(i8[T, D], f32[T, 1]): symmetric, a scale a row; an all-zero row gets quotients of 0."""
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), SMALLEST_MAXIMUM)
    return jnp.rint(x * (127 / largest)).astype(jnp.int8), largest * (1 / 127)


IMPLEMENTATION = Int8MatmulImplementation("xla", True, common_reasons, matmul)
