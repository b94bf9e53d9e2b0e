"""The definition of ragged paged attention in NumPy, row by row and query by query, in float64.

Slow on purpose and never chosen unless named. It needs concrete arrays (it cannot be traced), copies the pages instead
of donating them, and shares its page layout `[L, P, 2, K, C, H]` with `xla`.
"""

from typing import Any

import numpy as np

from pallas_kernels.dispatch import host_reasons
from pallas_kernels.ragged_paged_attention.contract import (
    Array,
    AttentionImplementation,
    AttentionSpec,
    common_reasons,
)
from pallas_kernels.ragged_paged_attention.page_dtypes import to_page_dtype

KV_HEAD_AXIS = 3
PAGE_SIZE_AXIS = 4


def kv_pages_shape(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype) -> tuple[int, ...]:
    del dtype
    return (num_layers, num_pages, 2, num_kv_heads, page_size, head_dim)


def unsupported_reasons(spec: AttentionSpec) -> list[str]:
    return common_reasons(spec) + host_reasons(spec.traced)


def make_schedule(*args, **kwargs) -> None:
    """The reference has nothing to prepare."""
    del args, kwargs


def pages_to_dense(kv_pages, layer, page_indices_row, kv_len) -> tuple[np.ndarray, np.ndarray]:
    pages = np.asarray(kv_pages)[int(np.ravel(layer)[0])]
    page_size, kv_len = pages.shape[3], int(kv_len)
    used = np.asarray(page_indices_row)[: -(-kv_len // page_size)]
    dense = np.moveaxis(pages[used], 3, 1).reshape(-1, *pages.shape[1:3], pages.shape[4])  # [S, 2, K, H]
    return dense[:kv_len, 0], dense[:kv_len, 1]


def dense_to_pages(kv_pages, layer, page_indices_row, keys, values) -> np.ndarray:
    pages, layer = np.array(kv_pages), int(np.ravel(layer)[0])
    keys, values = (np.asarray(dense).astype(pages.dtype) for dense in (keys, values))
    for position, (key, value) in enumerate(zip(keys, values, strict=True)):
        write_token(pages, layer, page_indices_row, position, key, value)
    return pages


def write_token(pages: np.ndarray, layer: int, page_indices_row, position: int, key, value) -> None:
    page_size = pages.shape[PAGE_SIZE_AXIS]
    page, slot = int(page_indices_row[position // page_size]), position % page_size
    pages[layer, page, 0, :, slot] = key
    pages[layer, page, 1, :, slot] = value


def softmax_with_sink(scores: np.ndarray, sink: float | None) -> np.ndarray:
    """Probabilities over `scores`; a sink is one more score whose probability is thrown away."""
    top = scores.max() if sink is None else max(scores.max(), sink)
    weights = np.exp(scores - top)
    return weights / (weights.sum() + (0.0 if sink is None else np.exp(sink - top)))


def attend_query(query, keys, values, scale, soft_cap, sinks) -> np.ndarray:
    """One query [N, H] against the keys and values [S, K, H] it sees."""
    num_heads, group = query.shape[0], query.shape[0] // keys.shape[1]
    output = np.zeros(query.shape, np.float64)
    for head in range(num_heads):
        scores = keys[:, head // group] @ query[head] * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = softmax_with_sink(scores, None if sinks is None else float(sinks[head]))
        output[head] = weights @ values[:, head // group]
    return output


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    kv_pages: Array,
    layer: Array,
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    *,
    schedule=None,
    scale: float,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    window: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    max_q_len: int | None = None,
    interpret: Any = False,
) -> tuple[np.ndarray, np.ndarray]:
    del schedule, max_q_len, interpret
    queries, pages = np.asarray(queries), np.array(kv_pages)
    keys = to_page_dtype(np.asarray(keys), k_scale, pages.dtype)
    values = to_page_dtype(np.asarray(values), v_scale, pages.dtype)
    k_scale, v_scale = (np.ones(()) if scale is None else np.asarray(scale, np.float64) for scale in (k_scale, v_scale))
    depth, reach = int(np.ravel(layer)[0]), 0 if window is None else int(window)
    page_table, starts = np.asarray(page_indices), np.asarray(cu_q_lens)
    outputs = np.zeros(queries.shape, np.float64)
    for row in range(int(distribution[2])):
        kv_len, tokens = int(kv_lens[row]), range(int(starts[row]), int(starts[row + 1]))
        if kv_len == 0:
            continue
        first = kv_len - len(tokens)
        for offset, token in enumerate(tokens):
            write_token(pages, depth, page_table[row], first + offset, keys[token], values[token])
        k_row, v_row = (dense.astype(np.float64) for dense in pages_to_dense(pages, depth, page_table[row], kv_len))
        k_row, v_row = k_row * k_scale[..., None], v_row * v_scale[..., None]
        for position, token in enumerate(tokens, start=first):
            seen = slice(max(0, position - reach + 1) if reach else 0, position + 1)
            query = queries[token].astype(np.float64)
            outputs[token] = attend_query(query, k_row[seen], v_row[seen], scale, soft_cap, sinks)
    return outputs.astype(queries.dtype), pages


IMPLEMENTATION = AttentionImplementation(
    name="reference",
    automatic=False,
    unsupported_reasons=unsupported_reasons,
    attend=attend,
    make_schedule=make_schedule,
    kv_pages_shape=kv_pages_shape,
    kv_head_axis=KV_HEAD_AXIS,
    page_size_axis=PAGE_SIZE_AXIS,
    pages_to_dense=pages_to_dense,
    dense_to_pages=dense_to_pages,
)
