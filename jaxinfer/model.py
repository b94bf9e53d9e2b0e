"""The seam between the engine and a model: what a step calls, and nothing more."""

from typing import Any, NamedTuple, Protocol

import jax


class Rows(NamedTuple):
    """The rows of a step, as the attention contract wants them (pallas_kernels/README.md)."""

    kv_lens: jax.Array  # i32[R], new tokens included; 0 is an inactive row
    page_indices: jax.Array  # i32[R, M]
    cu_q_lens: jax.Array  # i32[R+1]
    distribution: jax.Array  # i32[3]


class Model(Protocol):
    """A model as pure functions; `testing.CountingModel` is one that can be done in the head."""

    @property
    def vocab_size(self) -> int: ...

    def new_pages(self, num_pages: int, page_size: int) -> Any:
        """Zeroed pages of all layers, placed on the model's devices."""
        ...

    def forward(self, params: Any, tokens: jax.Array, positions: jax.Array, kv_pages: Any, rows: Rows, *,
                max_q_len: int | None) -> tuple[jax.Array, Any]:
        """Hidden states [T, D] of tokens i32[T] at positions i32[T], and the written pages.

        max_q_len 1 promises that every row has exactly one query (T = R).
        """
        ...

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """f32[R, V] from hidden states [R, D]."""
        ...
