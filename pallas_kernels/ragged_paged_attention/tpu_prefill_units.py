"""How the prefill kernel for TPUs cuts a block's work into units, each of which goes through three stages."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ragged_paged_attention.tpu_prefill_blocks import QUERY_ROWS


class Unit(NamedTuple):
    """A part of a block's work: `num_rows` rows of a head from `row` on, and the buffers they use."""

    head: Any
    row: Any
    num_rows: int
    ring: int


@dataclass(frozen=True)
class Units:
    """How a block's work is cut: units of `rows` rows, of which a head has `a_head`; `at_once` have no loop between
    them (all, some heads' or some of a head's), and between the stages of one lie those of `lead` others.
    """

    rows: int
    a_head: int
    at_once: int
    lead: int
    num_kv_heads: int

    @property
    def num_groups(self) -> int:
        return self.num_kv_heads * self.a_head // self.at_once

    def unit(self, group, number: int) -> Unit:
        """A unit of a group of `at_once`."""
        if self.at_once >= self.a_head:
            head, row = group * (self.at_once // self.a_head) + number // self.a_head, number % self.a_head
        else:
            groups = self.a_head // self.at_once
            head, row = lax.div(group, groups), lax.rem(group, groups) * self.at_once + number
        row = row * self.rows
        if not isinstance(row, int):
            row = pl.multiple_of(row, QUERY_ROWS)
        return Unit(head, row, self.rows, number % self.num_buffers)

    @property
    def num_buffers(self) -> int:
        """Of each stage: what a unit hands on is read `lead` units later."""
        return 2 * self.lead
