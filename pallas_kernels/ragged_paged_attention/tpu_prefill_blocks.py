"""Block sizes of the TPU kernels for rows with more than one query: tuned ones, else a rule."""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.dispatch import Device
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec

# Rows of a packed tile of the narrowest dtype that is copied along it: bfloat16 packs 16 rows in a tile, 8-bit types 32
# (Pallas TPU, "tiling"). Copies from and to HBM start and end at multiples.
QUERY_ROWS = 16
WINDOW_ROWS = 32
# With at most this many queries a row, items are whole rows, and all of a kv head's queries are one operand.
MAX_ROW_QUERIES = 16
# TPUs whose matrix units have 256 columns (`pltpu.get_tpu_info().mxu_column_size`, which a test compares).
WIDE = ("TPU v6", "TPU7x")
# Tokens at once under masks and a soft cap, which takes registers too: of 512, 5.1 % of the bundles spill on a v6e
# (32/8 heads of 128, bfloat16) and 5.3 % on a tpu7x (of 64), of 256 at most 0.2 % (libtpu 0.0.48).
MASKED_AND_CAPPED = 256


@dataclass(frozen=True)
class PrefillBlocks:
    """Static sizes of the kernels' loops.

    Fields:
      queries: tokens of an item (a power of two, at least QUERY_ROWS when items are tiles).
      fetch: tokens of context a copy brings, in whole pages.
      compute: tokens of context multiplied at once where all are seen by all queries; divides `fetch`.
      masked: tokens of context at once where some are not seen; divides `compute`.
      rows, masked_rows: rows of an operand (queries times group) that go through softmax together, plain and
        where masks or a soft cap take registers too.
      lead, masked_lead: units of so many rows between the stages of one: while it is in softmax, the unit so much later
        is in the product with keys and the one so much earlier in the product with values.
      chunk: rows of a unit whose scores are in registers at once.
      at_once: most units without a loop between them.
      write: tokens written at once, at most a page.
    """

    queries: int
    fetch: int
    compute: int
    masked: int
    rows: int
    masked_rows: int
    lead: int
    masked_lead: int
    chunk: int
    at_once: int
    write: int


def is_few(max_q_len: int | None) -> bool:
    """Whether items are whole rows."""
    return max_q_len is not None and max_q_len <= MAX_ROW_QUERIES


def prefill_key(num_q_heads: int, num_kv_heads: int, head_dim: int, kv_dtype, page_size: int) -> dict[str, str | int]:
    """Of `tuned/ragged_paged_attention_prefill.json`. Heads are a word: blocks for others may not fit VMEM."""
    return {
        "kv_dtype": jnp.dtype(kv_dtype).name,
        "heads": f"{num_kv_heads} x {head_dim}",
        "group": num_q_heads // num_kv_heads,
        "page_size": page_size,
    }


def prefill_blocks(spec: AttentionSpec) -> PrefillBlocks:
    """For rows of many queries what was tuned for the device, the dtype of the pages and the heads; else the rule."""
    key = prefill_key(spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.kv_dtype, spec.page_size)
    tuned = None if is_few(spec.max_q_len) else tuning.lookup("ragged_paged_attention_prefill", spec.device.kind, **key)
    return blocks_with(spec, tuned or default_units(spec.device, spec.head_dim))


def blocks_with(spec: AttentionSpec, units: dict[str, int]) -> PrefillBlocks:
    """units: the fields of `PrefillBlocks` but for those that follow from the call."""
    few = is_few(spec.max_q_len)
    queries = 1 << (spec.max_q_len - 1).bit_length() if few and spec.max_q_len else 128
    packed = QUERY_ROWS if jnp.dtype(spec.kv_dtype).itemsize > 1 else WINDOW_ROWS
    return PrefillBlocks(queries=queries, write=min(spec.page_size, packed if few else 128), **units)


def capped(blocks: PrefillBlocks) -> PrefillBlocks:
    """For a call with a soft cap; what a schedule was built with holds for layers with and without."""
    return replace(blocks, masked=min(blocks.masked, MASKED_AND_CAPPED))


def default_units(device: Device, head_dim: int) -> dict[str, int]:
    """Units of 64 rows keep matrix units of 128 columns busy without spills (libtpu 0.0.48, v5e: 0.97 of the peak where
    nothing is masked, 0.1 % of the bundles spill; with 128 rows 0.92 and 5 %). 256 columns want 128 rows: v6e 0.36 of
    the peak, of which heads of 128 leave half, instead of 0.30; with masks those would spill, and so would heads of 256
    with more than 32 rows. 4, 16 and 32 units at once take ever fewer bundles a unit; more lengthen the code and its
    compilation. Where the kernel is interpreted only the number of operations counts.
    """
    masked = {"masked": 256, "masked_rows": 64, "masked_lead": 3}
    shared = {"fetch": 512, "compute": 512, "rows": 64, "lead": 3, "chunk": 16, "at_once": 32, **masked}
    if device.platform != "tpu":
        return shared | {"rows": 128, "masked_rows": 128, "lead": 1, "masked_lead": 1, "chunk": 128, "at_once": 1}
    wide = {"masked": 512, "rows": 128, "lead": 2, "masked_lead": 2, "chunk": 32, "at_once": 16}
    found = shared | (wide if device.kind.startswith(WIDE) else {})
    return found | ({"rows": 32, "masked_rows": 32, "lead": 2, "masked_lead": 2} if head_dim > 128 else {})
