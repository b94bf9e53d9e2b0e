"""A target and its drafter behind the engine's seam (`jaxinfer.model.Model`): one page table, one prefix cache."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxinfer.drafter import Drafter
from jaxinfer.layout import ProposalLayout
from jaxinfer.model import Model, Rows


class Pair(NamedTuple):
    """Parameters or state of both: the target's pages, the drafter's state."""

    target: Any
    draft: Any


@dataclass(frozen=True)
class PairCache:
    """`kv_cache.KVCache` of both."""

    target: Any
    drafter: Drafter
    num_pages: int
    page_size: int

    @property
    def bytes_per_page(self) -> int:
        return self.target.bytes_per_page + self.drafter.bytes_per_page(self.page_size)

    @property
    def fixed_bytes(self) -> int:
        """On each device, whatever the number of pages."""
        return self.drafter.fixed_bytes

    def struct(self) -> Pair:
        return Pair(self.target.struct(), self.drafter.struct(self.num_pages, self.page_size))


@dataclass(frozen=True)
class DraftPair:
    """Hashable, holds no arrays. To a step it is the target, beside which the drafter's state is carried along."""

    target: Model
    drafter: Drafter

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        return getattr(self.target, "mesh", None)

    @property
    def proposal_layout(self) -> ProposalLayout:
        """Of proposals that come from outside."""
        return ProposalLayout(self.drafter.num_entered, self.drafter.num_candidates)

    def cache(self, num_pages: int, page_size: int) -> PairCache:
        """Shape, sharding and bytes of the pages and of the drafter's state."""
        target: Any = self.target
        return PairCache(target.cache(num_pages, page_size), self.drafter, num_pages, page_size)

    def new_pages(self, num_pages: int, page_size: int) -> Pair:
        return Pair(self.target.new_pages(num_pages, page_size), self.drafter.new_state(num_pages, page_size))

    def forward(
        self, params: Pair, tokens: jax.Array, positions: jax.Array, kv_pages: Pair, rows: Rows, *,
        max_q_len: int | None,
    ) -> tuple[jax.Array, Pair]:  # fmt: skip
        """The target's hidden states [T, D] and pages; the drafter sees nothing of it."""
        hidden, target = self.target.forward(params.target, tokens, positions, kv_pages.target, rows,
                                             max_q_len=max_q_len)  # fmt: skip
        return hidden, Pair(target, kv_pages.draft)

    def insist(self, kv_pages: Pair, on: bool) -> Pair:
        """See `Drafter.insist`."""
        return Pair(kv_pages.target, self.drafter.insist(kv_pages.draft, on))

    def logits(self, params: Pair, hidden: jax.Array) -> jax.Array:
        """f32[R, V] of the target."""
        return self.target.logits(params.target, hidden)


def has_plain_programs(model: Model | DraftPair) -> bool:
    """Whether there are programs of the target alone beside those of the pair."""
    return isinstance(model, DraftPair) and not model.drafter.sees_rounds
