"""Ragged paged attention in plain XLA: what CPUs and older GPUs run.

Work follows the true lengths of the rows. `xla_schedule` sorts the work; here loops with dynamic trip counts walk it:
the row form serves W rows with few queries each together, the tile form one tile of queries of one long row at a time.
Both gather a block of pages straight into the layout the two matmuls want and keep an online softmax in float32. A
row's blocks start at its position 0, so what a row computes does not depend on its neighbours: iterations that a
neighbour needs and the row does not are exact no-ops (p = 0, alpha = 1).

Pages are `[L, P, 2, K, C, H]`: head-major, so that a (page, kv head) is one contiguous C x H matrix.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.ragged_paged_attention.contract import (
    AttentionImplementation,
    AttentionSpec,
    Options,
    common_reasons,
)
from pallas_kernels.ragged_paged_attention.page_dtypes import SCALED, is_scaled, to_page_dtype
from pallas_kernels.ragged_paged_attention.xla_schedule import (
    Items,
    Schedule,
    make_schedule,
    pages_a_block,
)

KV_HEAD_AXIS = 3
PAGE_SIZE_AXIS = 4
DTYPES = ("float32", "bfloat16", "float16")
# Finite, so that m - m is 0 and not NaN for a query that has seen nothing yet.
NOTHING_SEEN = -1e30


def kv_pages_shape(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype) -> tuple[int, ...]:
    del dtype
    return (num_layers, num_pages, 2, num_kv_heads, page_size, head_dim)


def unsupported_reasons(spec: AttentionSpec) -> list[str]:
    reasons = common_reasons(spec)
    for name, dtype, known in (("dtype", spec.dtype, DTYPES), ("kv_dtype", spec.kv_dtype, DTYPES + SCALED)):
        if jnp.dtype(dtype).name not in known:
            reasons.append(f"{name} {jnp.dtype(dtype).name} is not one of {', '.join(known)}")
    shape = spec.kv_pages_shape
    if shape is not None and (len(shape) != 6 or shape[2:] != (2, spec.num_kv_heads, spec.page_size, spec.head_dim)):
        wanted = f"[L, P, 2, {spec.num_kv_heads}, C, {spec.head_dim}]"
        reasons.append(f"kv_pages of shape {shape} do not have this implementation's layout {wanted}")
    return reasons


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
    schedule: Schedule | None = None,
    scale: float,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    window: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    max_q_len: int | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """See `api.ragged_paged_attention`."""
    del interpret
    num_tokens, num_q_heads, head_dim = queries.shape
    page_size, num_kv_heads = kv_pages.shape[PAGE_SIZE_AXIS], keys.shape[1]
    if schedule is None:
        spec = AttentionSpec(num_q_heads, num_kv_heads, head_dim, page_size, queries.dtype, kv_pages.dtype, max_q_len)
        schedule = make_schedule(kv_lens, page_indices, cu_q_lens, distribution, num_tokens=num_tokens, spec=spec)
    # A layer number the compiler cannot see keeps the loops of unrolled layers identical: XLA:CPU then compiles each of
    # their kernels once (half the compile time of 5 layers).
    layer = lax.optimization_barrier(jnp.asarray(layer, jnp.int32).reshape(()))
    options = Options.make(scale, soft_cap, sinks, window, k_scale, v_scale)
    new_keys, new_values = to_page_dtype(keys, k_scale, kv_pages.dtype), to_page_dtype(values, v_scale, kv_pages.dtype)
    kv_pages = write_new(new_keys, new_values, kv_pages, layer, schedule)
    outputs = attend_few(queries, kv_pages, layer, schedule, options)
    if schedule.many:
        outputs = attend_many(outputs, queries, kv_pages, layer, schedule, options)
    # Without the barrier a next layer's write that depends on no output may be scheduled before these reads: XLA then
    # copies all pages to keep both.
    return lax.optimization_barrier((outputs, kv_pages))


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_new(keys: Array, values: Array, kv_pages: Array, layer: Array, schedule: Schedule) -> Array:
    """Writes the new keys and values [T, K, H] of the pages' dtype in place (when the pages are donated or carried by a
    loop).

    On a CPU the scatter takes 18 us for 64 decode tokens and 57 us for a prefill of 512, less than a loop over pages.
    """
    new = jnp.stack([keys, values], axis=1)  # [T, 2, K, H]
    at = kv_pages.at[layer, schedule.page, :, :, schedule.slot]
    return at.set(new, mode="drop", unique_indices=True)  # tokens that go nowhere have pages out of range


# ---- attending -------------------------------------------------------------------------------------------------------


def attend_few(queries: Array, kv_pages: Array, layer: Array, schedule: Schedule, options: Options) -> Array:
    """Outputs [T, N, H] of the row form; zeros for the tokens of all other rows."""
    items, width = schedule.few, schedule.few_width
    dtype = compute_dtype(schedule.blocks.row_float32, queries, kv_pages)

    def chunk(c: Array, buffer: Array) -> Array:
        new = attend_items(queries, kv_pages, layer, items, c * width, width, dtype, options)
        return lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (c * width, 0, 0, 0))

    buffer = jnp.zeros_like(queries, shape=(*items.tokens.shape, *queries.shape[1:]))
    buffer = lax.fori_loop(0, lax.div(items.count + width - 1, width), chunk, buffer)
    return buffer.reshape(-1, *queries.shape[1:]).at[schedule.few_slot].get(mode="fill", fill_value=0)


def attend_many(
    outputs: Array, queries: Array, kv_pages: Array, layer: Array, schedule: Schedule, options: Options
) -> Array:
    """`outputs` [T, N, H] with the tokens of the tile form's rows filled in."""
    num_tokens = outputs.shape[0]
    dtype = compute_dtype(schedule.blocks.tile_float32, queries, kv_pages)
    largest = max(items.tokens.shape[1] for items in schedule.many)
    outputs = jnp.pad(outputs, ((0, largest), (0, 0), (0, 0)))  # a short tile at the end may reach beyond T
    for items in schedule.many:

        def one_tile(i: Array, outputs: Array, items: Items = items) -> Array:
            new = attend_items(queries, kv_pages, layer, items, i, 1, dtype, options)[0]
            at = (items.tokens[i, 0], 0, 0)
            old = lax.dynamic_slice(outputs, at, new.shape)  # other rows' where the tile is short
            mine = items.positions[i] >= 0
            return lax.dynamic_update_slice(outputs, jnp.where(mine[:, None, None], new.astype(old.dtype), old), at)

        outputs = lax.fori_loop(0, items.count, one_tile, outputs)
    return outputs[:num_tokens]


def compute_dtype(in_float32: bool, queries: Array, kv_pages: Array):
    if in_float32 or is_scaled(kv_pages.dtype):  # bfloat16 holds all int8 and fp8 numbers, and so does float16
        return jnp.float32 if in_float32 else queries.dtype
    return jnp.promote_types(queries.dtype, kv_pages.dtype)


def attend_items(
    queries: Array,
    kv_pages: Array,
    layer: Array,
    items: Items,
    item: Array,
    width: int,
    dtype,
    options: Options,
) -> Array:
    """Outputs f32[W, Q, N, H] of the items `item .. item + W`; zeros for their unused queries."""
    _, num_q_heads, head_dim = queries.shape
    num_kv_heads, page_size = kv_pages.shape[KV_HEAD_AXIS], kv_pages.shape[PAGE_SIZE_AXIS]
    num_queries = items.tokens.shape[1]
    group = num_q_heads // num_kv_heads
    block_pages = pages_a_block(items.kv_block, page_size)
    kv_block = block_pages * page_size
    heads_first = (width, num_kv_heads, num_queries * group)  # [W, K, A], A = Q * G rows of both matmuls

    ends = lax.dynamic_slice(items.ends, (item,), (width,))
    positions = lax.dynamic_slice(items.positions, (item, 0), (width, num_queries))
    q = queries.at[lax.dynamic_slice(items.tokens, (item, 0), (width, num_queries))].get(mode="clip").astype(dtype)
    q = q.reshape(width, num_queries, num_kv_heads, group, head_dim).swapaxes(1, 2)
    state = tuple(x.reshape(*heads_first, *x.shape[4:]) for x in first_state(q, options.sinks))
    q = q.reshape(*heads_first, head_dim)
    positions = jnp.repeat(positions, group, axis=1)[:, None, :, None]  # [W, 1, A, 1]
    lowest = lowest_seen(positions, options.window)

    def block(b: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        pages = lax.dynamic_slice(items.pages, (item, b * block_pages), (width, block_pages))
        keys, values = (gather_pages(kv_pages, layer, which, pages).astype(dtype) for which in (0, 1))  # [W, K, S, H]
        kv_positions = b * kv_block + jnp.arange(kv_block)
        mine = (kv_positions < ends[:, None])[:, None, :, None]
        values = jnp.where(mine, values, 0)  # 0 * NaN is NaN: masking the scores is not enough
        seen = kv_positions <= positions
        if lowest is not None:
            seen &= kv_positions >= lowest
        return online_softmax(state, q, keys, values, seen, options)

    first_block = 0 if lowest is None else lax.div(jnp.min(jnp.where(positions >= 0, lowest, ends.max())), kv_block)
    end_block = lax.div(ends.max() + kv_block - 1, kv_block)
    _, l, acc = lax.fori_loop(first_block, end_block, block, state)
    out = jnp.where(positions >= 0, acc / jnp.where(l > 0, l, 1)[..., None], 0)
    out = out if options.v_scale is None else out * by_head(options.v_scale)
    out = out.reshape(width, num_kv_heads, num_queries, group, head_dim).swapaxes(1, 2)
    return out.reshape(width, num_queries, num_q_heads, head_dim)


def first_state(q: Array, sinks: Array | None) -> tuple[Array, Array, Array]:
    """(m, l, acc) before any context, for q [W, K, Q, G, H]; a sink is a score seen already, with no value.

    Made like `q` so that inside `shard_map` they vary over the same mesh axes, which a loop's state must.
    """
    acc = jnp.zeros_like(q, jnp.float32)
    no_head = jnp.zeros_like(q[..., 0], jnp.float32)
    if sinks is None:
        return no_head + NOTHING_SEEN, no_head, acc
    _, num_kv_heads, _, group, _ = q.shape
    return no_head + sinks.astype(jnp.float32).reshape(1, num_kv_heads, 1, group), no_head + 1, acc


def lowest_seen(positions: Array, window: Array | None) -> Array | None:
    """First position a query sees; None when no window is given at all."""
    return None if window is None else jnp.where(window > 0, jnp.maximum(positions - window + 1, 0), 0)


def gather_pages(kv_pages: Array, layer: Array, which: int, pages: Array) -> Array:
    """Keys (which 0) or values (1) [W, K, n * C, H] of the pages i32[W, n].

    One gather of C x H matrices, straight into the order the matmuls want.
    """
    num_pages, _, num_kv_heads, page_size, head_dim = kv_pages.shape[1:]
    matrices = kv_pages.reshape(-1, page_size, head_dim)
    head = which * num_kv_heads + jnp.arange(num_kv_heads)[:, None]
    index = (layer * num_pages + pages)[:, None, :] * (2 * num_kv_heads) + head
    gathered = matrices.at[index].get(mode="clip")  # [W, K, n, C, H]
    return gathered.reshape(*gathered.shape[:2], -1, head_dim)


def by_head(scale: Array) -> Array:
    """f32[] or f32[K] to something that multiplies [W, K, A, S or H]."""
    return jnp.asarray(scale, jnp.float32).reshape(-1, 1, 1)


def online_softmax(
    state: tuple[Array, Array, Array], q: Array, k: Array, v: Array, seen: Array, options: Options
) -> tuple[Array, Array, Array]:
    """One block of context: q [W, K, A, H], k and v [W, K, S, H], seen bool[W, 1, A, S]."""
    m, l, acc = state
    scores = jnp.einsum("wkah,wksh->wkas", q, k, preferred_element_type=jnp.float32)
    scores = scores * (options.scale if options.k_scale is None else options.scale * by_head(options.k_scale))
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = jnp.where(seen, scores, NOTHING_SEEN)
    m_new = jnp.maximum(m, scores.max(-1))
    p = jnp.where(seen, jnp.exp(scores - m_new[..., None]), 0)
    alpha = jnp.exp(m - m_new)
    pv = jnp.einsum("wkas,wksh->wkah", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return m_new, l * alpha + p.sum(-1), acc * alpha[..., None] + pv


# ---- pages in and out ------------------------------------------------------------------------------------------------


def pages_to_dense(kv_pages: Array, layer: Array, page_indices_row: Array, kv_len: Array | int) -> tuple[Array, Array]:
    num_pages = page_indices_row.shape[0]
    page_size = kv_pages.shape[PAGE_SIZE_AXIS]
    layer = jnp.asarray(layer, jnp.int32).reshape(())
    used = jnp.where(jnp.arange(num_pages) * page_size < kv_len, page_indices_row, 0)
    dense = jnp.stack([gather_pages(kv_pages, layer, which, used[None])[0] for which in (0, 1)]).swapaxes(1, 2)
    if isinstance(kv_len, int):
        dense = dense[:, :kv_len]
    dense = jnp.where((jnp.arange(dense.shape[1]) < kv_len)[:, None, None], dense, 0)
    return dense[0], dense[1]


def dense_to_pages(kv_pages: Array, layer: Array, page_indices_row: Array, keys: Array, values: Array) -> Array:
    positions = jnp.arange(keys.shape[0])
    page_size = kv_pages.shape[PAGE_SIZE_AXIS]
    layer = jnp.asarray(layer, jnp.int32).reshape(())
    new = jnp.stack([keys, values], axis=1).astype(kv_pages.dtype)  # [S, 2, K, H]
    pages = jnp.asarray(page_indices_row)[positions // page_size]
    return kv_pages.at[layer, pages, :, :, positions % page_size].set(new, mode="drop")


IMPLEMENTATION = AttentionImplementation(
    name="xla",
    automatic=True,
    unsupported_reasons=unsupported_reasons,
    attend=attend,
    make_schedule=make_schedule,
    kv_pages_shape=kv_pages_shape,
    kv_head_axis=KV_HEAD_AXIS,
    page_size_axis=PAGE_SIZE_AXIS,
    pages_to_dense=pages_to_dense,
    dense_to_pages=dense_to_pages,
)
