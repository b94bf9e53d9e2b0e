"""Ragged paged attention: one contract for every back end.

Letters: T packed tokens, R rows, N query heads, K kv heads, H head width, L layers, P pages, C tokens a page, M pages a
row, S context tokens. Rows come sorted: one query, a few queries, many queries; `distribution` holds the cumulative
ends.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jax.core import Tracer

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention import gpu, reference, tpu, xla
from pallas_kernels.ragged_paged_attention.contract import Array, AttentionImplementation, AttentionSpec
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled

OPERATION = "ragged_paged_attention"
# First supported wins; the reference serves only callers who name it.
IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = (
    tpu.IMPLEMENTATION,
    gpu.IMPLEMENTATION,
    xla.IMPLEMENTATION,
    reference.IMPLEMENTATION,
)


def resolve(spec: AttentionSpec, implementation: str | None = None) -> str:
    """The name of the implementation that serves `spec`.

    Resolve once, when the pages are made, and pass the name to every other call: implementations differ in page layout.

    Raises:
      Unsupported: with all reasons, when the named one (or, with None, none) can serve.
      ValueError: for an unknown name.
    """
    return dispatch.choose(OPERATION, IMPLEMENTATIONS, spec, implementation).name


def explain(spec: AttentionSpec) -> tuple[dispatch.Verdict, ...]:
    """One line an implementation: chosen or not, and why not."""
    return dispatch.explain(IMPLEMENTATIONS, spec)


def ragged_paged_attention(
    queries: Array,
    keys: Array,
    values: Array,
    kv_pages: Array,
    layer: Array | int,
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    *,
    schedule: Any = None,
    scale: float,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    window: Array | int | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    max_q_len: int | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Writes the new keys and values into their pages, then attends causally, each row to its own pages only.

    Row r's token i (packed at `cu_q_lens[r] + i`) goes to position `kv_lens[r] - q_len[r] + i` and sees positions up to
    its own. A row with `kv_lens == 0` is inactive: nothing is read or written for it and its outputs are zeros. So are
    the outputs of padding tokens (at or beyond `cu_q_lens[distribution[2]]`). Entries of `page_indices` beyond a row's
    length are never used, and what pages and slots that are not the row's hold never reaches a result, NaN included.

    For fixed shapes a row's outputs are bit-identical whatever the other rows are.

    Args:
      queries: [T, N, H], float32 or bfloat16.
      keys, values: [T, K, H] of the new tokens; K divides N.
      kv_pages: pages of all layers, `kv_pages_shape(...)`. Donate it to have it written in place.
      layer: i32[] (or i32[1]), may be traced.
      kv_lens: i32[R], tokens of each row, the new ones included.
      page_indices: i32[R, M], the pages of each row.
      cu_q_lens: i32[R + 1], cumulative numbers of new tokens.
      distribution: i32[3], cumulative ends of the rows with exactly one query, a few, many; rows behind are padding.
      schedule: from `make_schedule` with the same arrays and implementation; built here when None.
      scale: factor of the scores (usually H ** -0.5).
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
      sinks: f32[N], a score a head that takes part in the softmax and has no value.
      window: i32[], may be traced; w > 0 lets a query at position p see positions p - w + 1 .. p, 0 is no window.
      k_scale, v_scale: f32[] or f32[K], may be traced: int8 and fp8 pages hold keys / k_scale and values / v_scale,
        rounded to nearest even and saturated. int8 pages need both, fp8 pages have 1 without them, other pages take
        none.
      max_q_len: the most queries of any row when known; 1 promises that no row has more (decode). More is an error that
        is not detected: the lengths are on the device.
      implementation: a name, or None for the first that supports the call.
      interpret: parameters of Pallas' interpreter (`pltpu.InterpretParams`, `plgpu.InterpretGPUParams`), with which the
        named kernel runs on any device; slow, for tests.

    Returns:
      Outputs [T, N, H] in the dtype of `queries`, and the written pages.

    Raises:
      Unsupported: with every reason.
      ValueError: shapes do not fit together, or an unknown implementation.
    """
    check_shapes(queries, keys, values, kv_lens, page_indices, cu_q_lens)
    if (k_scale is not None or v_scale is not None) and not is_scaled(kv_pages.dtype):
        raise ValueError(f"pages of {kv_pages.dtype} take neither k_scale nor v_scale")
    spec = AttentionSpec(
        num_q_heads=queries.shape[1],
        num_kv_heads=keys.shape[1],
        head_dim=queries.shape[2],
        page_size=1,
        dtype=queries.dtype,
        kv_dtype=kv_pages.dtype,
        max_q_len=max_q_len,
        soft_cap=soft_cap is not None,
        sinks=sinks is not None,
        scales=k_scale is not None or v_scale is not None,
        kv_pages_shape=tuple(kv_pages.shape),
        interpret=bool(interpret),
        traced=isinstance(queries, Tracer),
    )
    chosen = choose_for_pages(spec, implementation)
    return chosen.attend(
        queries, keys, values, kv_pages, layer, kv_lens, page_indices, cu_q_lens, distribution,
        schedule=schedule, scale=scale, soft_cap=soft_cap, sinks=sinks, window=window,
        k_scale=k_scale, v_scale=v_scale, max_q_len=max_q_len, interpret=interpret,
    )  # fmt: skip


def check_shapes(queries, keys, values, kv_lens, page_indices, cu_q_lens) -> None:
    """Raises ValueError naming the argument that does not fit."""
    num_tokens, _, head_dim = queries.shape
    num_rows = kv_lens.shape[0]
    expected = {
        "keys": (keys.shape, (num_tokens, keys.shape[1], head_dim)),
        "values": (values.shape, (num_tokens, keys.shape[1], head_dim)),
        "page_indices": (page_indices.shape, (num_rows, page_indices.shape[1])),
        "cu_q_lens": (cu_q_lens.shape, (num_rows + 1,)),
    }
    for name, (shape, wanted) in expected.items():
        if tuple(shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(shape)}, expected {wanted}")


def choose_for_pages(spec: AttentionSpec, implementation: str | None) -> AttentionImplementation:
    """As `dispatch.choose`, each implementation reading the page size where its own layout has it."""
    shape = spec.kv_pages_shape or ()

    def reasons(candidate: AttentionImplementation, spec: AttentionSpec) -> list[str]:
        page_size = shape[candidate.page_size_axis] if len(shape) > candidate.page_size_axis else 1
        return candidate.unsupported_reasons(replace(spec, page_size=page_size))

    views = [replace(each, unsupported_reasons=partial(reasons, each)) for each in IMPLEMENTATIONS]
    return dispatch.choose(OPERATION, views, spec, implementation)


def make_schedule(
    kv_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array,
    *,
    num_tokens: int,
    page_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    kv_dtype: Any,
    max_q_len: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """The work list of a step, built once and given to the attention of every layer.

    Args: as `ragged_paged_attention`; num_tokens is T, the head counts are those of one shard, `max_q_len` must be the
      same as in the calls that use the schedule.

    Returns:
      A pytree of the implementation (None where it needs nothing); it may cross jit, scan and shard_map (replicated).
    """
    spec = AttentionSpec(num_q_heads, num_kv_heads, head_dim, page_size, dtype, kv_dtype, max_q_len,
                         scales=is_scaled(kv_dtype), interpret=interpret)  # fmt: skip
    chosen = dispatch.choose(OPERATION, IMPLEMENTATIONS, spec, implementation)
    return chosen.make_schedule(kv_lens, page_indices, cu_q_lens, distribution, num_tokens=num_tokens, spec=spec)


def kv_pages_shape(
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    *,
    implementation: str | None = None,
) -> tuple[int, ...]:
    """Shape of the pages of all layers, `[L, P, ...]`; make it with `jnp.zeros(shape, dtype)`."""
    if implementation is None:
        spec = AttentionSpec(num_kv_heads, num_kv_heads, head_dim, page_size, kv_dtype=dtype, scales=is_scaled(dtype))
        implementation = resolve(spec)
    chosen = named(implementation)
    return chosen.kv_pages_shape(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype)


def kv_head_axis(implementation: str) -> int:
    """The axis of `kv_pages_shape` that holds the kv heads: the one to shard over a mesh."""
    return named(implementation).kv_head_axis


def pages_to_dense(
    kv_pages: Array, layer: Array | int, page_indices_row: Array, kv_len: Array | int, *, implementation: str
) -> tuple[Array, Array]:
    """Keys and values [S, K, H] of one row, in the pages' dtype.

    With an int `kv_len` S is kv_len; with an array S is M * C and what lies beyond kv_len is zero.
    """
    return named(implementation).pages_to_dense(kv_pages, layer, page_indices_row, kv_len)


def dense_to_pages(
    kv_pages: Array, layer: Array | int, page_indices_row: Array, keys: Array, values: Array, *, implementation: str
) -> Array:
    """Pages with `keys` and `values` [S, K, H] written to positions 0 .. S - 1 of one row; the rest is untouched."""
    return named(implementation).dense_to_pages(kv_pages, layer, page_indices_row, keys, values)


def named(
    implementation: str, candidates: Sequence[AttentionImplementation] = IMPLEMENTATIONS
) -> AttentionImplementation:
    for candidate in candidates:
        if candidate.name == implementation:
            return candidate
    raise ValueError(f"{OPERATION}: implementation {implementation!r} is not one of {[c.name for c in candidates]}")
