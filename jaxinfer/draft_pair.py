"""A target and its draft model behind the engine's seam (`jaxinfer.model.Model`): one page table, one prefix cache.

A prefill step runs both, so a page holds the keys and values of the same tokens for both models; ids, tables and
lengths are shared.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxinfer.model import Model, Rows


class Pair(NamedTuple):
    """Parameters or pages of both."""

    target: Any
    draft: Any


@dataclass(frozen=True)
class PairCache:
    """`kv_cache.KVCache` of both models."""

    target: Any
    draft: Any

    @property
    def bytes_per_page(self) -> int:
        return self.target.bytes_per_page + self.draft.bytes_per_page

    def struct(self) -> Pair:
        return Pair(self.target.struct(), self.draft.struct())


@dataclass(frozen=True)
class DraftPair:
    """Hashable, holds no arrays. The vocabularies are one. num_drafted: most tokens drafted in a round."""

    target: Model
    draft: Model
    num_drafted: int

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        return getattr(self.target, "mesh", None)

    def cache(self, num_pages: int, page_size: int) -> PairCache:
        """Shape, sharding and bytes of the pages."""
        both: Any = self
        return PairCache(both.target.cache(num_pages, page_size), both.draft.cache(num_pages, page_size))

    def new_pages(self, num_pages: int, page_size: int) -> Pair:
        return Pair(self.target.new_pages(num_pages, page_size), self.draft.new_pages(num_pages, page_size))

    def forward(
        self, params: Pair, tokens: jax.Array, positions: jax.Array, kv_pages: Pair, rows: Rows, *,
        max_q_len: int | None,
    ) -> tuple[jax.Array, Pair]:  # fmt: skip
        """The target's hidden states [T, D]; the draft model's keys and values are written too."""
        hidden, target = self.target.forward(params.target, tokens, positions, kv_pages.target, rows,
                                             max_q_len=max_q_len)  # fmt: skip
        _, draft = self.draft.forward(params.draft, tokens, positions, kv_pages.draft, rows, max_q_len=max_q_len)
        return hidden, Pair(target, draft)

    def logits(self, params: Pair, hidden: jax.Array) -> jax.Array:
        """f32[R, V] of the target."""
        return self.target.logits(params.target, hidden)
