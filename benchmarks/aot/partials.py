"""Partial results of Hopper's decode attention: of those that a call has room for, what a step writes and reads."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from benchmarks.aot.hlo import Array
from pallas_kernels.ragged_paged_attention import AttentionSpec, gpu_blocks, gpu_schedule


@dataclass(frozen=True)
class Partials:
    """Splits of (row, kv head): room for so many in each array, as its first dimension, and how many there are."""

    room: int
    used: int

    @classmethod
    def of(cls, spec: AttentionSpec, num_rows: int, context: int, longest: int) -> Self:
        """Of a step of `num_rows` rows of one query and `context` tokens, `longest` at most by their page table."""
        blocks = gpu_schedule.for_rows_up_to(longest, gpu_blocks.decode_blocks(spec, 1, num_rows))
        lengths = np.array([context], np.int32)
        tiles = -(-lengths // blocks.kv_tokens)
        splits = int(gpu_schedule.split_rows(lengths, tiles, blocks)[0][0])  # pyright: ignore[reportArgumentType]
        pairs = num_rows * spec.num_kv_heads
        return cls(pairs * blocks.max_splits, pairs * splits if splits > 1 else 0)  # one split is written at once

    def holds(self, array: Array) -> bool:
        """Whether these are the partial sums, or their maxima and denominators: f32[room, ., .]."""
        return array.dtype == "f32" and len(array.dims) == 3 and array.dims[0] == self.room

    def num_bytes(self, array: Array) -> int:
        return array.hbm_bytes * self.used // self.room
