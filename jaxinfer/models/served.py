"""The decoder behind the engine's seam (`jaxinfer.model.Model`)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.config import ModelConfig
from jaxinfer.kv_cache import KVCache, kv_cache
from jaxinfer.model import Rows
from jaxinfer.models import decoder
from jaxinfer.params import Params


@dataclass(frozen=True)
class Decoder:
    """A model's static half: what a compiled step closes over. Hashable, holds no arrays.

    dtype: of activations. kv_dtype: of pages. implementation: of attention, by name (see `make_decoder`).
    """

    config: ModelConfig
    dtype: Any
    kv_dtype: Any
    implementation: str
    mesh: Mesh | None = None

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def cache(self, num_pages: int, page_size: int) -> KVCache:
        """Shape, sharding and bytes of the pages."""
        return kv_cache(
            self.config, num_pages=num_pages, page_size=page_size, dtype=self.dtype, kv_dtype=self.kv_dtype,
            mesh=self.mesh, implementation=self.implementation,
        )  # fmt: skip

    def new_pages(self, num_pages: int, page_size: int) -> jax.Array:
        """Zeroed pages of all layers, placed on the model's devices."""
        return self.cache(num_pages, page_size).allocate()

    def forward(
        self, params: Params, tokens: jax.Array, positions: jax.Array, kv_pages: jax.Array, rows: Rows, *,
        max_q_len: int | None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """See `decoder.forward`."""
        return decoder.forward(
            params, self.config, tokens, positions, kv_pages, rows,
            implementation=self.implementation, max_q_len=max_q_len, mesh=self.mesh,
        )  # fmt: skip

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """See `decoder.logits`."""
        return decoder.logits(params, self.config, hidden, mesh=self.mesh)

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        """See `decoder.embeddings`."""
        return decoder.embeddings(params, self.config, tokens, mesh=self.mesh)


def make_decoder(
    config: ModelConfig,
    *,
    dtype: Any,
    page_size: int,
    kv_dtype: Any = None,
    mesh: Mesh | None = None,
    implementation: str | None = None,
) -> Decoder:
    """A Decoder with the attention chosen: the named one, or the first that serves the model with such pages.

    kv_dtype: of pages; `dtype` when None. With int8 or fp8 pages the parameters must hold their scales (`kv_scales`).

    Raises InvalidConfig with every reason.
    """
    cache = kv_cache(
        config, num_pages=1, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype, mesh=mesh,
        implementation=implementation,
    )  # fmt: skip
    return Decoder(config, jnp.dtype(dtype), cache.dtype, cache.implementation, mesh)
