"""Ragged paged attention: the contract (`api`) and its implementations."""

from pallas_kernels.ragged_paged_attention.api import (
    dense_to_pages,
    explain,
    kv_head_axis,
    kv_pages_shape,
    make_schedule,
    pages_to_dense,
    ragged_paged_attention,
    resolve,
)
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec

__all__ = [
    "AttentionSpec",
    "dense_to_pages",
    "explain",
    "kv_head_axis",
    "kv_pages_shape",
    "make_schedule",
    "pages_to_dense",
    "ragged_paged_attention",
    "resolve",
]
