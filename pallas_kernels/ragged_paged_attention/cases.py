"""Named shapes and options of ragged paged attention, shared by tests and benchmarks, and the arrays of a case."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention.page_dtypes import SCALED, is_scaled, to_page_dtype

# In pages that have no NaN: a number that no key or value has there.
INT8_POISON = -128


@dataclass(frozen=True)
class AttentionCase:
    """A step, small enough to read.

    Fields:
      rows: (q_len, kv_len) of each row, sorted: one query, a few, many. kv_len 0 is an inactive row.
      num_single, num_few: how many rows belong to the first two classes; the rest has many queries.
      num_padding_rows, num_padding_tokens: added behind the rows and tokens in use.
      max_q_len: the static hint given to the call.
      num_kv_heads, group, head_dim: K, G and H.
      num_pages: of the pool; None for three more than the rows hold.
    """

    name: str
    rows: tuple[tuple[int, int], ...]
    num_single: int = 0
    num_few: int = 0
    num_padding_rows: int = 0
    num_padding_tokens: int = 0
    max_q_len: int | None = None
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    page_size: int = 4
    max_pages: int = 16
    num_pages: int | None = None
    num_layers: int = 2
    layer: int = 1
    dtype: str = "float32"
    kv_dtype: str = "float32"
    soft_cap: float | None = None
    sinks: bool = False
    window: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(q_len for q_len, _ in self.rows) + self.num_padding_tokens

    @property
    def num_rows(self) -> int:
        return len(self.rows) + self.num_padding_rows


@dataclass(frozen=True)
class AttentionInputs:
    """NumPy arrays of a case, positional arguments first; everything that must not be read is poisoned."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    kv_pages: np.ndarray  # in the layout [L, P, 2, K, C, H]
    layer: np.ndarray
    kv_lens: np.ndarray
    page_indices: np.ndarray
    cu_q_lens: np.ndarray
    distribution: np.ndarray
    sinks: np.ndarray | None
    window: np.ndarray | None
    k_scale: np.ndarray | None  # f32[K], for scaled pages
    v_scale: np.ndarray | None

    def arguments(self) -> tuple[np.ndarray, ...]:
        """The positional arguments of `ragged_paged_attention`."""
        return (self.queries, self.keys, self.values, self.kv_pages, self.layer, self.kv_lens, self.page_indices,
                self.cu_q_lens, self.distribution)  # fmt: skip


def make_inputs(case: AttentionCase, seed: int = 0) -> AttentionInputs:
    """Normally distributed queries, keys, values and contexts; NaN (or INT8_POISON) in every page and slot that no row
    owns.

    Page table entries beyond a row's length are garbage (far out of range and negative), padding tokens are NaN, and
    padding rows carry lengths that must not be believed.
    """
    rng = np.random.default_rng(seed)
    dtype, kv_dtype = jnp.dtype(case.dtype), jnp.dtype(case.kv_dtype)
    shape_k = (case.num_tokens, case.num_kv_heads, case.head_dim)
    queries = rng.normal(size=(case.num_tokens, case.num_kv_heads * case.group, case.head_dim)).astype(dtype)
    keys, values = rng.normal(size=shape_k).astype(dtype), rng.normal(size=shape_k).astype(dtype)
    q_lens = np.array([q_len for q_len, _ in case.rows], np.int32)
    used = int(q_lens.sum())
    for padded in (queries, keys, values):
        padded[used:] = np.nan
    kv_lens = np.full(case.num_rows, 3, np.int32)
    kv_lens[: len(case.rows)] = [kv_len for _, kv_len in case.rows]
    cu_q_lens = np.full(case.num_rows + 1, used, np.int32)
    cu_q_lens[: len(case.rows) + 1] = np.concatenate([[0], np.cumsum(q_lens)])
    padding = np.arange(1, case.num_padding_rows + 1)
    cu_q_lens[len(case.rows) + 1 :] += np.minimum(padding, case.num_padding_tokens)  # padding rows claim a token each
    k_scale, v_scale = make_scales(case, rng)
    page_indices, kv_pages = make_pages(case, rng, kv_dtype, k_scale, v_scale)
    num_heads = case.num_kv_heads * case.group
    return AttentionInputs(
        queries=queries,
        keys=keys,
        values=values,
        kv_pages=kv_pages,
        layer=np.asarray(case.layer, np.int32),
        kv_lens=kv_lens,
        page_indices=page_indices,
        cu_q_lens=cu_q_lens,
        distribution=np.array([case.num_single, case.num_single + case.num_few, len(case.rows)], np.int32),
        sinks=rng.normal(size=num_heads).astype(np.float32) if case.sinks else None,
        window=None if case.window is None else np.asarray(case.window, np.int32),
        k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip


def make_scales(case: AttentionCase, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Of each kv head, (f32[K], f32[K]): int8 saturates at about 4 deviations."""
    if not is_scaled(case.kv_dtype):
        return None, None
    typical = 4 / 127 if case.kv_dtype == "int8" else 1.0
    k_scale, v_scale = (typical * rng.uniform(0.5, 1.5, size=(2, case.num_kv_heads))).astype(np.float32)
    return k_scale, v_scale


def make_pages(
    case: AttentionCase, rng: np.random.Generator, kv_dtype, k_scale, v_scale
) -> tuple[np.ndarray, np.ndarray]:
    """(page_indices i32[R, M], kv_pages): shuffled pages, only the context before the new tokens is not poison."""
    pages_used = [-(-kv_len // case.page_size) for _, kv_len in case.rows]
    num_pages = case.num_pages or sum(pages_used) + 3
    shuffled = rng.permutation(num_pages).astype(np.int32)
    garbage = np.array([-1, 2**31 - 1, num_pages, 0], np.int32)
    page_indices = rng.choice(garbage, size=(case.num_rows, case.max_pages))
    shape = (case.num_layers, num_pages, 2, case.num_kv_heads, case.page_size, case.head_dim)
    kv_pages = np.full(shape, np.nan, np.float32).astype(kv_dtype) if kv_dtype != np.int8 else np.full(
        shape, INT8_POISON, np.int8)  # fmt: skip
    taken = 0
    for row, ((q_len, kv_len), count) in enumerate(zip(case.rows, pages_used, strict=True)):
        page_indices[row, :count] = shuffled[taken : taken + count]
        taken += count
        for position in range(kv_len - q_len if kv_len else 0):
            page, slot = page_indices[row, position // case.page_size], position % case.page_size
            new = rng.normal(size=(2, case.num_kv_heads, case.head_dim))
            for which, scale in enumerate((k_scale, v_scale)):
                kv_pages[case.layer, page, which, :, slot] = to_page_dtype(new[which][None], scale, kv_dtype)[0]
    return page_indices, kv_pages


DECODE_ROWS = tuple((1, kv_len) for kv_len in (1, 37, 4, 5, 64, 0, 8, 23, 2, 0, 51))
# Small steps of the shapes that the kernels serve: head widths from 64, pages from 16.
KERNEL_ROWS = {
    "kernel_decode": {"rows": ((1, 1), (1, 70), (1, 16), (1, 0), (1, 33)), "num_single": 5, "max_q_len": 1},
    "kernel_verify": {"rows": ((3, 18), (3, 3), (1, 40), (2, 0)), "num_few": 4, "max_q_len": 3},
    "kernel_mixed": {"rows": ((1, 35), (1, 0), (3, 18), (20, 20), (9, 50)), "num_single": 2, "num_few": 1},
}
# A prompt and the middle of another: several tiles of queries and of context, neither whole at either end.
LONG_ROWS = {"kernel_prefill": {"rows": ((100, 100), (40, 210)), "num_kv_heads": 1, "max_pages": 16}}


def kernel_case(name: str, rows: str, kv_dtype: str = "bfloat16", **fields) -> AttentionCase:
    return AttentionCase(name, **{"dtype": "bfloat16", "kv_dtype": kv_dtype, "head_dim": 128, "page_size": 16,
                                  "max_pages": 8} | (KERNEL_ROWS | LONG_ROWS)[rows] | fields)  # fmt: skip


MIXED_ROWS = ((1, 9), (1, 0), (1, 30), (3, 12), (4, 4), (5, 45), (17, 17), (9, 60), (80, 101))

CASES: tuple[AttentionCase, ...] = (
    AttentionCase("decode", DECODE_ROWS, num_single=11, max_q_len=1),
    AttentionCase("decode_without_hint", DECODE_ROWS, num_single=11),
    AttentionCase("decode_padded", DECODE_ROWS, num_single=11, max_q_len=1, num_padding_rows=5, num_padding_tokens=5),
    AttentionCase("decode_one_row", ((1, 61),), num_single=1, max_q_len=1),
    AttentionCase("decode_bfloat16", DECODE_ROWS, num_single=11, max_q_len=1, dtype="bfloat16", kv_dtype="bfloat16"),
    AttentionCase("decode_group_1_bfloat16", DECODE_ROWS, num_single=11, max_q_len=1, group=1, dtype="bfloat16",
                  kv_dtype="bfloat16"),
    AttentionCase("decode_one_kv_head", DECODE_ROWS, num_single=11, max_q_len=1, num_kv_heads=1, group=8),
    AttentionCase("decode_group_5", DECODE_ROWS, num_single=11, max_q_len=1, group=5),
    AttentionCase("decode_window", DECODE_ROWS, num_single=11, max_q_len=1, window=7),
    AttentionCase("decode_window_zero", DECODE_ROWS, num_single=11, max_q_len=1, window=0),
    AttentionCase("decode_soft_cap", DECODE_ROWS, num_single=11, max_q_len=1, soft_cap=2.0),
    AttentionCase("decode_sinks", DECODE_ROWS, num_single=11, max_q_len=1, sinks=True),
    AttentionCase("decode_nothing_active", ((1, 0), (1, 0)), num_single=2, max_q_len=1),
    AttentionCase("decode_long", tuple((1, n) for n in (700, 3, 300, 515, 128, 129)), num_single=6, max_q_len=1,
                  page_size=16, max_pages=64),
    AttentionCase("decode_page_256", tuple((1, n) for n in (700, 3, 256, 257)), num_single=4, max_q_len=1,
                  page_size=256, max_pages=4),
    AttentionCase("page_1", ((1, 9), (1, 1), (6, 6), (5, 20)), num_single=2, page_size=1, max_pages=32),
    AttentionCase("page_3", ((1, 9), (1, 1), (6, 6), (5, 20)), num_single=2, page_size=3),
    AttentionCase("verify", ((5, 12), (5, 5), (3, 40), (0, 0), (5, 0), (1, 17), (5, 63)), num_few=7, max_q_len=5),
    AttentionCase("verify_window_bfloat16", ((5, 12), (5, 5), (3, 40), (1, 17)), num_few=4, max_q_len=5, window=6,
                  dtype="bfloat16", kv_dtype="bfloat16"),
    AttentionCase("mixed", MIXED_ROWS, num_single=3, num_few=2, max_pages=32),
    AttentionCase("mixed_padded", MIXED_ROWS, num_single=3, num_few=2, max_pages=32, num_padding_rows=3,
                  num_padding_tokens=40),
    AttentionCase("mixed_bfloat16", MIXED_ROWS, num_single=3, num_few=2, max_pages=32, dtype="bfloat16",
                  kv_dtype="bfloat16"),
    AttentionCase("mixed_float32_on_bfloat16_pages", MIXED_ROWS, num_single=3, max_pages=32, kv_dtype="bfloat16"),
    AttentionCase("mixed_window", MIXED_ROWS, num_single=3, num_few=2, max_pages=32, window=11),
    AttentionCase("mixed_everything", MIXED_ROWS, num_single=3, num_few=2, max_pages=32, window=20, soft_cap=3.0,
                  sinks=True, num_padding_rows=2, num_padding_tokens=9, dtype="bfloat16", kv_dtype="bfloat16"),
    AttentionCase("prefill", ((200, 200), (70, 300)), page_size=16, max_pages=32, head_dim=64),
    AttentionCase("prefill_window", ((200, 200), (70, 500)), page_size=16, max_pages=32, window=100),
    AttentionCase("prefill_short_and_long", ((1, 70), (300, 300), (130, 190), (128, 128), (129, 129), (40, 600),
                  (257, 400), (3, 3)), num_single=1, page_size=16, max_pages=64),
    AttentionCase("prefill_short_and_long_window", ((300, 600), (20, 20), (200, 900), (64, 128)), page_size=16,
                  max_pages=64, window=130),
    AttentionCase("prefill_head_256", ((12, 12), (7, 33)), head_dim=256, num_kv_heads=1, group=1),
    AttentionCase("unsorted_lengths_in_tiles", ((65, 65), (2, 60), (64, 64), (1, 30)), page_size=8),
    *(AttentionCase(f"decode_{dtype}_pages", DECODE_ROWS, num_single=11, max_q_len=1, kv_dtype=dtype)
      for dtype in SCALED),
    *(AttentionCase(f"mixed_everything_{dtype}_pages", MIXED_ROWS, num_single=3, num_few=2, max_pages=32, window=20,
                    soft_cap=3.0, sinks=True, num_padding_rows=2, num_padding_tokens=9, dtype="bfloat16",
                    kv_dtype=dtype) for dtype in SCALED),
    *(kernel_case(f"{rows}_{dtype}_head_{head_dim}", rows, dtype, head_dim=head_dim)
      for rows in KERNEL_ROWS for dtype in ("bfloat16", *SCALED) for head_dim in (64, 128, 256)),
    *(kernel_case(f"{rows}_float32_pages", rows, "float32", dtype="float32") for rows in KERNEL_ROWS),
    *(kernel_case(f"{rows}_float32_queries", rows, dtype="float32") for rows in KERNEL_ROWS),
    *(kernel_case(f"{rows}_float32_queries_int8", rows, "int8", dtype="float32") for rows in KERNEL_ROWS),
    *(kernel_case(f"{rows}_bfloat16_queries_float32", rows, "float32") for rows in KERNEL_ROWS),
    *(kernel_case(f"{rows}_page_{page_size}", rows, page_size=page_size)
      for rows in KERNEL_ROWS for page_size in (32, 64, 128, 256)),
    *(kernel_case(f"{rows}_page_256_int8", rows, "int8", page_size=256) for rows in KERNEL_ROWS),
    *(kernel_case(f"{rows}_heads_{heads}_kv_heads_{kv_heads}", rows, num_kv_heads=kv_heads, group=heads // kv_heads)
      for rows in KERNEL_ROWS
      for heads, kv_heads in ((1, 1), (2, 2), (8, 1), (5, 1), (4, 4), (8, 8), (16, 2), (16, 1), (64, 1))),
    *(kernel_case(f"{rows}_window_{window}_head_{head_dim}", rows, window=window, head_dim=head_dim)
      for rows in KERNEL_ROWS for window in (0, 20) for head_dim in (64, 128)),
    *(kernel_case(f"{rows}_soft_cap_{dtype}", rows, dtype, soft_cap=2.0)
      for rows in KERNEL_ROWS for dtype in ("bfloat16", *SCALED)),
    *(kernel_case(f"{rows}_sinks_head_{head_dim}", rows, sinks=True, head_dim=head_dim)
      for rows in KERNEL_ROWS for head_dim in (64, 128, 256)),
    *(kernel_case(f"{rows}_everything_{dtype}_head_{head_dim}", rows, dtype, head_dim=head_dim, window=33, soft_cap=3.0,
                  sinks=True, num_padding_rows=2, num_padding_tokens=3)
      for rows in KERNEL_ROWS for dtype in ("bfloat16", *SCALED) for head_dim in (64, 128, 256)),
    *(kernel_case(f"kernel_prefill_head_{head_dim}", "kernel_prefill", head_dim=head_dim, group=group)
      for head_dim, group in ((64, 4), (128, 8), (256, 3))),
    kernel_case("kernel_prefill_window", "kernel_prefill", window=60, group=4),
    kernel_case("kernel_prefill_int8", "kernel_prefill", "int8", group=4),
)  # fmt: skip
