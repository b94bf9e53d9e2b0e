"""Drives a decoder through its pages as an engine does, in two fixed shapes: a ragged prefill and a decode step."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.model import Rows
from jaxinfer.models import make_decoder

PAGE_SIZE = 8
PAGES_A_ROW = 16
MAX_TOKENS = 64


def tiny_config(**changes) -> ModelConfig:
    """A model that uses every field: 2 layers of which one has a window, biases, query and key norms."""
    fields = {
        "family": "llama",
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope": RopeConfig(),
        "windows": (0, 8),
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
    }
    return ModelConfig(**{**fields, **changes})


def make_rows(*fields: Any) -> Rows:
    """Rows of NumPy arrays or of shapes."""
    return Rows(*fields)


def two_rows() -> Rows:
    """Shapes of two rows of four pages, for compiling."""
    return make_rows(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (2, 4), (3,), (3,))))


class PagedModel:
    """R rows with pages scattered over a pool that is otherwise NaN (int8: -128).

    Every position's logits are computed, by `prefill` (chunks of several rows packed together) or by `decode` (a token
    a row).
    """

    def __init__(self, config: ModelConfig, params, num_rows: int, dtype=jnp.float32, mesh=None, kv_dtype=None):
        self.params, self.num_rows = params, num_rows
        self.decoder = make_decoder(config, dtype=dtype, page_size=PAGE_SIZE, mesh=mesh, kv_dtype=kv_dtype)
        num_pages = num_rows * PAGES_A_ROW + 4
        self.pages = self.decoder.new_pages(num_pages, PAGE_SIZE)
        poison = -128 if self.pages.dtype == jnp.int8 else jnp.nan
        self.pages = jax.jit(lambda x: jnp.full_like(x, poison), out_shardings=self.pages.sharding)(self.pages)
        table = np.random.default_rng(0).permutation(num_pages)[: num_rows * PAGES_A_ROW]
        self.page_table = table.reshape(num_rows, PAGES_A_ROW).astype(np.int32)
        self.lengths = np.zeros(num_rows, np.int32)
        self.step = partial(jax.jit(step, static_argnums=(0, 6), donate_argnums=4), self.decoder)

    def prefill(self, chunks: list[list[int]]) -> list[np.ndarray]:
        """Appends a chunk to each row (may be empty); its logits [len(chunk), V]. Sorts rows as the contract wants."""
        order = sorted(range(self.num_rows), key=lambda row: (len(chunks[row]) == 0, len(chunks[row]) > 1))
        q_lens = np.array([len(chunks[row]) for row in order], np.int32)
        ends = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        tokens, positions = np.zeros(MAX_TOKENS, np.int32), np.zeros(MAX_TOKENS, np.int32)
        for i, row in enumerate(order):
            tokens[ends[i] : ends[i + 1]] = chunks[row]
            positions[ends[i] : ends[i + 1]] = self.lengths[row] + np.arange(q_lens[i])
        self.lengths += np.array([len(chunk) for chunk in chunks], np.int32)
        kv_lens = np.where(q_lens > 0, self.lengths[order], 0).astype(np.int32)
        ones = int(np.sum(q_lens == 1))
        distribution = np.array([ones, ones, np.sum(q_lens > 0)], np.int32)
        rows = make_rows(kv_lens, self.page_table[order], ends, distribution)
        logits, self.pages = self.step(self.params, tokens, positions, self.pages, rows, None)
        at = {row: i for i, row in enumerate(order)}
        return [np.asarray(logits)[ends[at[row]] : ends[at[row] + 1]] for row in range(self.num_rows)]

    def decode(self, tokens: list[int]) -> np.ndarray:
        """Appends one token to every row; logits [R, V]."""
        positions = self.lengths.copy()
        self.lengths += 1
        every = np.full(3, self.num_rows, np.int32)
        ends = np.arange(self.num_rows + 1, dtype=np.int32)
        rows = make_rows(self.lengths.copy(), self.page_table, ends, every)
        logits, self.pages = self.step(self.params, np.array(tokens, np.int32), positions, self.pages, rows, 1)
        return np.asarray(logits)

    def prefill_all(self, prompts: list[list[int]], chunk: int) -> list[np.ndarray]:
        """Whole prompts in chunks; logits of every position."""
        found: list[list[np.ndarray]] = [[] for _ in prompts]
        for start in range(0, max(map(len, prompts)), chunk):
            for row, logits in enumerate(self.prefill([prompt[start : start + chunk] for prompt in prompts])):
                found[row].append(logits)
        return [np.concatenate(parts) for parts in found]


def step(decoder, params, tokens, positions, pages, rows, max_q_len):
    """Logits of all tokens, and the pages."""
    hidden, pages = decoder.forward(params, tokens, positions, pages, rows, max_q_len=max_q_len)
    return decoder.logits(params, hidden), pages
