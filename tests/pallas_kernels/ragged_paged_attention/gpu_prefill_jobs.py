"""Compiles the Hopper prefill kernel for an H200, in a process of its own."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.aot.programs import Program
from pallas_kernels.aot.targets import target
from pallas_kernels.ragged_paged_attention.contract import Options
from pallas_kernels.ragged_paged_attention.gpu_prefill import PrefillBlocks, attend_many
from pallas_kernels.ragged_paged_attention.gpu_prefill_schedule import make_prefill_schedule
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled, to_page_dtype

# A prompt of 8k tokens of an 8B model.
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, NUM_ROWS = 8192, 32, 8, 8


def prefill(head_dim: int, kv_dtype: str, page_size: int, everything: bool, register_operands: bool) -> Program:
    """attend_many for all rows of a step, with every option or none; the pages (argument 3) are donated."""
    pages = (2, 2 * NUM_TOKENS // page_size, 2, NUM_KV_HEADS, page_size, head_dim)
    blocks = PrefillBlocks.choose(head_dim, kv_dtype, register_operands)

    def step(queries, keys, values, kv_pages, layer, kv_lens, table, cu_q_lens, distribution, sinks, window, scales):
        rows = (kv_lens, table, cu_q_lens, distribution)
        schedule = make_prefill_schedule(*rows, num_tokens=NUM_TOKENS, group=NUM_HEADS // NUM_KV_HEADS,
                                         page_size=page_size, first_row_class=0)  # fmt: skip
        k_scale = v_scale = scales if is_scaled(kv_dtype) else None
        options = Options.make(head_dim**-0.5, 20.0 if everything else None, sinks if everything else None,
                               window if everything else None, k_scale, v_scale)  # fmt: skip
        new = (to_page_dtype(keys, k_scale, kv_dtype), to_page_dtype(values, v_scale, kv_dtype))
        pages_ref = jax.new_ref(kv_pages)
        outputs = attend_many(queries, *new, pages_ref, layer, table, schedule, options, jnp.zeros_like(queries),
                              blocks=blocks)  # fmt: skip
        return outputs, jax.freeze(pages_ref)

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    new = array("bfloat16", NUM_TOKENS, NUM_KV_HEADS, head_dim)
    arguments = (
        array("bfloat16", NUM_TOKENS, NUM_HEADS, head_dim), new, new, array(kv_dtype, *pages), array("int32"),
        array("int32", NUM_ROWS), array("int32", NUM_ROWS, NUM_TOKENS // page_size), array("int32", NUM_ROWS + 1),
        array("int32", 3), array("float32", NUM_HEADS), array("int32"), array("float32", NUM_KV_HEADS),
    )  # fmt: skip
    return Program("prefill", step, arguments, (3,))


def compile_prefill(calls: list[list], register_operands: bool) -> list[dict[str, int]]:
    """The job: compiles each (head_dim, kv_dtype, page_size, everything): bytes of temporaries, aliased, of pages."""
    found = []
    for head_dim, kv_dtype, page_size, everything in calls:
        program = prefill(head_dim, kv_dtype, page_size, everything, register_operands)
        memory = program.compile(target("h200:1").mesh()).memory_analysis()
        pages = program.arguments[3]
        found.append({"temporaries": memory.temp_size_in_bytes, "aliased": memory.alias_size_in_bytes,
                      "pages": math.prod(pages.shape) * jnp.dtype(pages.dtype).itemsize})  # fmt: skip
    return found
