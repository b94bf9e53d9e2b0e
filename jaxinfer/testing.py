"""A model one can do in the head, for tests and benchmarks of everything around the model.

Its next token is (last + 1) mod V. It goes through the real steps, sampler, pages and engine: each token is written
to its page, and the model answers from the page, not from its input, so a wrong page or length shows in the output.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.model import Rows


@dataclass(frozen=True)
class CountingModel:
    """Pages are i32[P, C]; the parameters are a scalar that is added to nothing."""

    vocab_size: int = 256
    peak: float = 20.0
    """Logit of the next token; all others are 0."""

    def new_pages(self, num_pages: int, page_size: int) -> jax.Array:
        return jnp.full((num_pages, page_size), -1, jnp.int32)

    def forward(self, params: Any, tokens: jax.Array, positions: jax.Array, kv_pages: jax.Array, rows: Rows, *,
                max_q_len: int | None) -> tuple[jax.Array, jax.Array]:
        """Hidden states f32[T, 1]: the token found in the page at the position before the next one."""
        num_pages, page_size = kv_pages.shape
        row = jnp.searchsorted(rows.cu_q_lens, jnp.arange(tokens.shape[0]), side="right") - 1
        row = jnp.minimum(row, rows.kv_lens.shape[0] - 1)
        active = (rows.kv_lens[row] > 0) & (jnp.arange(tokens.shape[0]) < rows.cu_q_lens[-1])
        page = rows.page_indices[row, positions // page_size]
        written = kv_pages.at[jnp.where(active, page, num_pages), positions % page_size].set(tokens, mode="drop")
        found = written.at[page, positions % page_size].get(mode="clip")
        return found[:, None].astype(jnp.float32) + 0.0 * params, written

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        following = (hidden[:, 0].astype(jnp.int32) + 1) % self.vocab_size
        return self.peak * jax.nn.one_hot(following, self.vocab_size, dtype=jnp.float32)

    def new_params(self) -> jax.Array:
        return jnp.float32(0.0)
