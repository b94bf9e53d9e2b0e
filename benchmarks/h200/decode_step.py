"""A decode step of an 8B model's shape with random weights: all layers, the head and the greedy choice, one program."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks.h200.contenders import Contender, of_jax
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.kv_cache import kv_cache
from jaxinfer.model import Rows
from jaxinfer.models.decoder import forward, logits
from jaxinfer.params import init_params

# Llama 3 8B (arXiv:2407.21783, table 3, and its published config.json).
CONFIG = ModelConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-5, rope=RopeConfig(theta=500000.0),
    windows=(0,) * 32,
)  # fmt: skip
PAGE_SIZE = 64
CONTEXT = 1024
"""Tokens of every row, the new one included."""


@dataclass(frozen=True)
class DecodeStep:
    """`num_bytes`: weights read once (one row of the embedding a token is left out) and the rows' keys and values."""

    contender: Contender
    num_bytes: int


def make(rows: int, config: ModelConfig = CONFIG) -> DecodeStep:
    pages_a_row = CONTEXT // PAGE_SIZE
    cache = kv_cache(config, num_pages=rows * pages_a_row, page_size=PAGE_SIZE, dtype=jnp.bfloat16)
    params = init_params(config)
    table = jnp.arange(rows * pages_a_row, dtype=jnp.int32).reshape(rows, pages_a_row)
    packed = Rows(jnp.full(rows, CONTEXT, jnp.int32), table, jnp.arange(rows + 1, dtype=jnp.int32),
                  jnp.full(3, rows, jnp.int32))  # fmt: skip
    positions = jnp.full(rows, CONTEXT - 1, jnp.int32)

    def step(state: tuple[jax.Array, jax.Array], params, packed: Rows) -> tuple[jax.Array, jax.Array]:
        tokens, pages = state
        hidden, pages = forward(params, config, tokens, positions, pages, packed, implementation=cache.implementation,
                                max_q_len=1)  # fmt: skip
        return jnp.argmax(logits(params, config, hidden), axis=-1).astype(jnp.int32), pages

    compiled = jax.jit(step, donate_argnums=0)
    state = (jnp.arange(rows, dtype=jnp.int32), cache.allocate())
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    embedding = math.prod(params["embed"].shape) * params["embed"].dtype.itemsize
    kv = rows * CONTEXT * cache.bytes_per_page // PAGE_SIZE
    return DecodeStep(of_jax(f"8B, {rows} rows", lambda state: compiled(state, params, packed), state),
                      weights - embedding + kv)  # fmt: skip
