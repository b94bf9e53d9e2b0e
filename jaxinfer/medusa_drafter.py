"""The target as its own drafter: heads go on from its last hidden state, one token after the other (`models.medusa`).

Neither pages nor prefill of its own: the state is the hidden state of each slot's last computed position. That position
predicted the row's last token, which the heads are told; they predict those behind it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxinfer import rule_table, sharding
from jaxinfer.acceptance import Drafted, draft_rows
from jaxinfer.drafter import Drafter, Prefilled, Round, Wanted
from jaxinfer.model import Model
from jaxinfer.models import Decoder
from jaxinfer.models.medusa import HeadsConfig, advance
from jaxinfer.row_state import RowState
from jaxinfer.sampling import sample
from jaxinfer.types import SamplerForm


class Heads(Protocol):
    """What the drafter calls of heads; hashable, without arrays."""

    def advance(self, params: Any, index: int, state: jax.Array, tokens: jax.Array) -> jax.Array:
        """The state [R, D] of head `index` from the one before and the tokens i32[R] between.

        params: `draft_pair.Pair`, the target's and the heads'.
        """
        ...


@dataclass(frozen=True)
class DecoderHeads:
    """Heads of a decoder, with its embedding."""

    config: HeadsConfig
    target: Decoder

    def advance(self, params: Any, index: int, state: jax.Array, tokens: jax.Array) -> jax.Array:
        embedded = self.target.embed(params.target, tokens)
        return advance(params.draft["heads"][index], self.config.rms_norm_eps, state, embedded)


@dataclass(frozen=True)
class MedusaDrafter(Drafter):
    """target: whose `logits` turn a head's state into its distribution. hidden_size, dtype: of the target's hidden
    states. num_drafted: at most the number of heads.
    """

    target: Model
    heads: Heads
    num_drafted: int
    max_num_seqs: int
    hidden_size: int
    dtype: Any
    mesh: jax.sharding.Mesh | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.max_num_seqs + 1, self.hidden_size

    @property
    def fixed_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * jnp.dtype(self.dtype).itemsize

    @property
    def _place(self) -> jax.sharding.Sharding:
        return sharding.replicated(self.mesh)

    def new_state(self, num_pages: int, page_size: int) -> jax.Array:
        return jnp.zeros(self.shape, self.dtype, device=self._place)

    def struct(self, num_pages: int, page_size: int) -> Any:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self._place)

    def observe_prefill(self, params: Any, state: jax.Array, rows: RowState, seen: Prefilled) -> jax.Array:
        last = jnp.clip(seen.rows.cu_q_lens[1:] - 1, 0)
        return self._entered(state, seen.slots, seen.rows.kv_lens > 0, seen.hidden[last])

    def observe_round(self, params: Any, state: jax.Array, rows: RowState, seen: Round) -> jax.Array:
        last = jnp.maximum(seen.count - 1, 0)
        return self._entered(state, seen.slots, seen.count > 0, seen.hidden[jnp.arange(last.shape[0]), last])

    def _entered(self, state: jax.Array, slots: jax.Array, known: jax.Array, hidden: jax.Array) -> jax.Array:
        """The state with hidden [R, D] of those rows that are `known`."""
        return state.at[jnp.where(known, slots, self.shape[0])].set(hidden.astype(self.dtype), mode="drop")

    def propose(self, form: SamplerForm, params: Any, state: jax.Array, rows: RowState, wanted: Wanted
                ) -> tuple[Drafted, jax.Array]:
        """As many as wanted, each sampled by its row's own distribution."""
        slots, sampling = wanted.slots, draft_rows(wanted.sampling)
        num_rows, width = slots.shape[0], self.num_drafted
        kv_len = rows.kv_len.at[slots].get(mode="clip")
        heads = [partial(self.heads.advance, params, index) for index in range(width)]

        def one_more(index, carry):
            hidden, last, tokens, seen = carry
            hidden = jax.lax.switch(index, heads, hidden, last).astype(self.dtype)
            logits = self.target.logits(params.target, hidden)
            if form is SamplerForm.FULL:
                logits = rule_table.apply(rows.rules, slots, logits, tokens, index)
            drawn = sample(logits, sampling, kv_len + 1 + index, form)
            seen = seen if seen is None else seen.at[:, index].set(logits)
            return hidden, drawn, tokens.at[:, index].set(drawn), seen

        # What greedy rows are verified against is the target's own token: the heads' distribution is of no use.
        vocab_size = self.target.vocab_size
        seen = None if form is SamplerForm.GREEDY else jnp.zeros((num_rows, width, vocab_size), jnp.float32)
        last = rows.last_token.at[slots].get(mode="clip")
        begin = state.at[slots].get(mode="clip"), last, jnp.zeros((num_rows, width), jnp.int32), seen
        _, _, tokens, seen = jax.lax.fori_loop(0, jnp.max(wanted.count), one_more, begin)
        return Drafted(tokens, wanted.count, seen), state
