"""Calls of the operations, made of shapes only, as a compiler for a target takes them.

Letters as in the operations: R rows, T tokens, N query heads, K kv heads, H head width, L layers, P pages, C tokens a
page, M pages a row, D in and F out features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import int8_matmul
from pallas_kernels import ragged_paged_attention as attention
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled
from pallas_kernels.tune import operations as tuned_operations


@dataclass(frozen=True)
class Program:
    """A function, its arguments as (trees of) `jax.ShapeDtypeStruct`, and which of them it may overwrite."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()

    def compile(self, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
        """Compiles for the devices of `mesh` (`Target.mesh`), every argument whole on each of them."""
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        platform = mesh.devices.flat[0].platform
        with jax.set_mesh(mesh):
            jitted = jax.jit(self.function, in_shardings=whole, out_shardings=whole, donate_argnums=self.donated)
            lowered = jitted.trace(*self.arguments).lower(
                lowering_platforms=("cuda" if platform == "gpu" else platform,)
            )
            return lowered.compile()


def ragged_paged_attention(
    *,
    num_rows: int = 32,
    q_len: int = 1,
    max_context: int = 1024,
    num_q_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 16,
    num_layers: int = 2,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    soft_cap: float | None = None,
    sinks: bool = False,
    window: bool = False,
    implementation: str | None = None,
) -> Program:
    """Rows of q_len queries each and up to max_context tokens; the pages (argument 3) are donated. Each row has room
    for its own pages. Options that the contract traces are arguments too, and so is the layer.
    """
    num_tokens, pages_a_row = num_rows * q_len, -(-max_context // page_size)
    shape = attention.kv_pages_shape(num_layers, num_rows * pages_a_row, page_size, num_kv_heads, head_dim, kv_dtype,
                                     implementation=implementation)  # fmt: skip
    new = _array(dtype, num_tokens, num_kv_heads, head_dim)
    rows = (_array("int32", num_rows), _array("int32", num_rows, pages_a_row), _array("int32", num_rows + 1),
            _array("int32", 3))  # fmt: skip
    scales = _array("float32", num_kv_heads)
    traced = {
        "sinks": _array("float32", num_q_heads) if sinks else None,
        "window": _array("int32") if window else None,
        "k_scale": scales if is_scaled(kv_dtype) else None,
        "v_scale": scales if is_scaled(kv_dtype) else None,
    }
    given = {name: value for name, value in traced.items() if value is not None}

    def step(queries, keys, values, pages, layer, kv_lens, page_indices, cu_q_lens, distribution, *options):
        return attention.ragged_paged_attention(
            queries, keys, values, pages, layer, kv_lens, page_indices, cu_q_lens, distribution,
            scale=head_dim**-0.5, soft_cap=soft_cap, max_q_len=q_len, implementation=implementation,
            **dict(zip(given, options, strict=True)),
        )  # fmt: skip

    queries = _array(dtype, num_tokens, num_q_heads, head_dim)
    arguments = (queries, new, new, _array(kv_dtype, *shape), _array("int32"), *rows, *given.values())
    return Program("ragged_paged_attention", step, arguments, donated=(3,))


def int8_matmul_program(
    *,
    num_rows: int = 16,
    in_features: int = 4096,
    out_features: int = 4096,
    quantize_activations: bool = True,
    num_layers: int | None = None,
    dtype: str = "bfloat16",
    out_dtype: str | None = None,
    implementation: str | None = None,
) -> Program:
    """One matmul, nothing donated; with num_layers a scan of x over a stack, D and F equal."""

    def matmul(x, values, scale, layer=None):
        return int8_matmul.int8_matmul(x, values, scale, layer=layer, quantize_activations=quantize_activations,
                                       out_dtype=out_dtype, implementation=implementation)  # fmt: skip

    def layers(x, values, scale):
        return jax.lax.scan(lambda x, layer: (matmul(x, values, scale, layer), None), x, jnp.arange(num_layers))[0]

    stack = () if num_layers is None else (num_layers,)
    arguments = (_array(dtype, num_rows, in_features), _array("int8", *stack, out_features, in_features),
                 _array("float32", *stack, out_features, 1))  # fmt: skip
    return Program("int8_matmul", matmul if num_layers is None else layers, arguments)


def tuned_call(*, operation: str, key: Mapping[str, Any], blocks: Mapping[str, Any]) -> Program:
    """The call of a shape class of `tune.operations` with given blocks, for the device in use (`jax.set_mesh`)."""
    return program_of(operation, tuned_operations.OPERATIONS[operation].call(key, dict(blocks)))


def program_of(name: str, call: tuned_operations.Call) -> Program:
    """Values of arguments are dropped; pages are donated."""
    shapes = jax.tree.map(lambda argument: jax.ShapeDtypeStruct(argument.shape, argument.dtype), call.arguments)
    return Program(name, call.function, shapes, () if call.pages is None else (call.pages,))


OPERATIONS: dict[str, Callable[..., Program]] = {
    "ragged_paged_attention": ragged_paged_attention,
    "int8_matmul": int8_matmul_program,
    "tuned": tuned_call,
}


def _array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
