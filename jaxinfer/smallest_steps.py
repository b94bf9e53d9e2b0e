"""The smallest sizes that steps are compiled for on a device: what anything smaller would not be faster than."""

from dataclasses import dataclass

from jaxinfer.config import FEW_TOKENS, row_sizes, token_sizes
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.dispatch import Device

LONGER = 1.1
"""A prefill step of the smallest size may compute this many times as long as its weights take to be read."""
WEIGHT_DTYPES = {None: ("bfloat16", 2), "int8_dynamic": ("int8", 1), "int8": ("bfloat16", 1)}
"""By weight format: dtype of the products, bytes of a weight."""


@dataclass(frozen=True, slots=True)
class SmallestSteps:
    """tokens: of a prefill step. rows: of a decode step."""

    tokens: int = FEW_TOKENS
    rows: int = 2

    def token_buckets(self, max_num_batched_tokens: int) -> tuple[int, ...]:
        return token_sizes(max_num_batched_tokens, self.tokens)

    def row_buckets(self, max_num_seqs: int) -> tuple[int, ...]:
        return row_sizes(max_num_seqs, self.rows)


def smallest_steps(device: Device, weight_format: str | None) -> SmallestSteps:
    """Of a known chip; of all others (CPUs) the defaults, where every row and token costs.

    Fewer programs are a shorter start: an 8B model's prefill program takes a quarter of a minute to compile.
    """
    chip = next((chip for chip in CHIPS.values() if chip.kind == device.kind), None)
    if chip is None:
        return SmallestSteps()
    # A TPU's vector registers hold 16 rows of bfloat16: fewer are padded to them. On GPUs the number of rows decides
    # into how many parts a row's context is split.
    return SmallestSteps(free_tokens(chip, weight_format), 16 if device.platform == "tpu" else 2)


def free_tokens(chip: Chip, weight_format: str | None) -> int:
    """The largest power of two of tokens whose products take at most LONGER times what reading the weight does."""
    dtype, num_bytes = WEIGHT_DTYPES[weight_format]
    flops = chip.flops_per_second.get(dtype, chip.flops_per_second["bfloat16"])
    tokens = LONGER * num_bytes * flops / (2 * chip.hbm_bytes_per_second)
    return 1 << (int(tokens).bit_length() - 1)
