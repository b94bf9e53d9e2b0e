"""A second, smaller model as the drafter: it computes what the target computes, into pages of the same ids.

Ids, tables and lengths are shared: a page holds the keys and values of the same tokens for both. A prefill step runs
both models, unless nothing will be proposed to its rows: their pages have the target's half only, and the pool knows.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import rule_table
from jaxinfer.acceptance import Drafted, draft_rows
from jaxinfer.drafter import Drafter, Prefilled, Told, Wanted
from jaxinfer.model import Model, Rows
from jaxinfer.row_state import RowState
from jaxinfer.sampling import sample
from jaxinfer.types import SamplerForm


@dataclass(frozen=True)
class DraftModel(Drafter):
    """Its vocabulary is the target's. The state is its pages."""

    model: Model
    num_drafted: int
    prompts_cost = True
    sees_rounds = False
    num_caught_up = 256

    def new_state(self, num_pages: int, page_size: int) -> Any:
        return self.model.new_pages(num_pages, page_size)

    def struct(self, num_pages: int, page_size: int) -> Any:
        model: Any = self.model
        return model.cache(num_pages, page_size).struct()

    def bytes_per_page(self, page_size: int) -> int:
        model: Any = self.model
        return model.cache(1, page_size).bytes_per_page

    def observe_prefill(self, params: Any, state: Any, rows: RowState, seen: Prefilled) -> Any:
        """Computes the packed tokens. Decode rows pack their last token alone, so before it the model computes the one
        before: where a round kept all of its proposals it has not seen the last of them.
        """
        num_rows = seen.slots.shape[0]
        kv_len = rows.kv_len.at[seen.slots].get(mode="clip")
        packed = Rows(jnp.where(seen.decodes, kv_len, 0), seen.rows.page_indices,
                      jnp.arange(num_rows + 1, dtype=jnp.int32), jnp.full(3, num_rows, jnp.int32))  # fmt: skip
        before = rows.token_before.at[seen.slots].get(mode="clip")
        _, pages = self.model.forward(params.draft, before, jnp.maximum(kv_len - 1, 0), state, packed, max_q_len=1)
        _, pages = self.model.forward(params.draft, seen.tokens, seen.positions, pages, seen.rows, max_q_len=None)
        return pages

    def catch_up(self, params: Any, state: Any, told: Told) -> Any:
        count = jnp.sum(told.tokens >= 0, dtype=jnp.int32)
        positions = told.first + jnp.arange(told.tokens.shape[0], dtype=jnp.int32)
        row = Rows((told.first + count)[None], told.page_indices[None], jnp.stack([jnp.int32(0), count]),
                   jnp.stack([jnp.int32(0), jnp.int32(0), jnp.int32(1)]))  # fmt: skip
        _, pages = self.model.forward(params.draft, jnp.maximum(told.tokens, 0), positions, state, row, max_q_len=None)
        return pages

    def propose(self, form: SamplerForm, params: Any, state: Any, rows: RowState, wanted: Wanted
                ) -> tuple[Drafted, Any]:
        """As many as wanted. The first forward computes the last two tokens of every row: where the round before kept
        all of its proposals the draft model has not seen the last of them, and where it has, the same keys and values
        are written again.
        """
        slots, count, page_indices = wanted.slots, wanted.count, wanted.page_indices
        sampling, pages = draft_rows(wanted.sampling), state
        num_rows, width = slots.shape[0], self.num_drafted
        kv_len = rows.kv_len.at[slots].get(mode="clip")
        tokens = jnp.stack([rows.token_before.at[slots].get(mode="clip"), rows.last_token.at[slots].get(mode="clip")],
                           axis=1)
        positions = jnp.maximum(jnp.stack([kv_len - 1, kv_len], 1), 0)
        two = jnp.arange(num_rows + 1, dtype=jnp.int32) * 2
        few = jnp.array([0, num_rows, num_rows], jnp.int32)
        hidden, pages = self.model.forward(
            params.draft, tokens.reshape(-1), positions.reshape(-1), pages,
            Rows(jnp.where(wanted.alive, kv_len + 1, 0), page_indices, two, few), max_q_len=2)  # fmt: skip

        def draw(hidden, index, tokens, seen):
            logits = self.model.logits(params.draft, hidden)
            if form is SamplerForm.FULL:
                logits = rule_table.apply(rows.rules, slots, logits, tokens, index)
            drawn = sample(logits, sampling, kv_len + 1 + index, form)
            seen = seen if seen is None else seen.at[:, index].set(logits)
            return tokens.at[:, index].set(drawn), seen

        def one_more(index, carry):
            tokens, seen, pages = carry
            goes_on = index < count
            last = jax.lax.dynamic_index_in_dim(tokens, index - 1, axis=1, keepdims=False)
            one = Rows(jnp.where(goes_on, kv_len + index + 1, 0), page_indices,
                       jnp.arange(num_rows + 1, dtype=jnp.int32), jnp.full(3, num_rows, jnp.int32))  # fmt: skip
            hidden, pages = self.model.forward(params.draft, last, kv_len + index, pages, one, max_q_len=1)
            return *draw(hidden, index, tokens, seen), pages

        # What greedy rows are verified against is the target's own token: the drafter's distribution is of no use.
        vocab_size = self.model.vocab_size
        seen = None if form is SamplerForm.GREEDY else jnp.zeros((num_rows, width, vocab_size), jnp.float32)
        tokens, seen = draw(hidden[1::2], 0, jnp.zeros((num_rows, width), jnp.int32), seen)
        tokens, seen, pages = jax.lax.fori_loop(1, jnp.max(count), one_more, (tokens, seen, pages))
        return Drafted(tokens, count, seen), pages
