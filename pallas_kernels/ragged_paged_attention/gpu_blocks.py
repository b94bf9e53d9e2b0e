"""Block sizes of attention on Hopper: what was tuned for the card and the shape, else the kernels' own rules."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import Device
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.gpu_prefill_unit import PrefillBlocks
from pallas_kernels.ragged_paged_attention.gpu_schedule import DecodeBlocks, padded_columns
from pallas_kernels.ragged_paged_attention.gpu_units import choose_blocks

DECODE, PREFILL = "ragged_paged_attention_gpu_decode", "ragged_paged_attention_gpu_prefill"
"""Names of the files in `tuned`."""


def decode_key(spec: AttentionSpec, queries: int, num_rows: int) -> dict[str, str | int]:
    """Words: dtype of the pages and columns times width ("8 x 128"), which decide about registers and shared memory."""
    columns = padded_columns(queries, spec.num_q_heads // spec.num_kv_heads)
    return {
        "kv_dtype": jnp.dtype(spec.kv_dtype).name,
        "columns": f"{columns} x {spec.head_dim}",
        "kv_heads": spec.num_kv_heads,
        "rows": num_rows,
        "page_size": spec.page_size,
    }


def decode_blocks(spec: AttentionSpec, queries: int, num_rows: int) -> DecodeBlocks:
    """Blocks for rows of `queries` queries at most; `gpu_units.choose_blocks` where nothing was tuned.

    A row is never split more often than the rule allows for this number of rows: that bounds the partial results.
    """
    rule = choose_blocks(spec, queries, num_rows)
    key = decode_key(spec, queries, num_rows)
    tuned = None if spec.interpret else tuning.lookup(DECODE, spec.device.kind, **key)
    if tuned is None:
        return rule
    blocks = DecodeBlocks(**tuned)
    return replace(blocks, max_splits=min(blocks.max_splits, rule.max_splits))


def prefill_key(head_dim: int, kv_dtype: Any, group: int, page_size: int) -> dict[str, str | int]:
    """Words: dtype of the pages and the width."""
    return {"kv_dtype": jnp.dtype(kv_dtype).name, "width": str(head_dim), "group": group, "page_size": page_size}


def prefill_blocks(
    head_dim: int, kv_dtype: Any, group: int, page_size: int, device: Device, interpret: bool
) -> PrefillBlocks:
    """`PrefillBlocks.choose` where nothing was tuned."""
    key = prefill_key(head_dim, kv_dtype, group, page_size)
    tuned = None if interpret else tuning.lookup(PREFILL, device.kind, **key)
    return PrefillBlocks(**tuned) if tuned else PrefillBlocks.choose(head_dim, kv_dtype, interpret=interpret)
