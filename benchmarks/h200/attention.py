"""Attention on the card: our kernel over pages, a stack of layers in one program, and what must be moved for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.h200.contenders import Contender, of_jax
from pallas_kernels.ragged_paged_attention import kv_pages_shape, make_schedule, ragged_paged_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
"""Of the 8B and 70B models of the Llama 3 family, a shard of 8 kv heads."""
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Load:
    """Rows of one attention call. q_lens and kv_lens as in the contract; num_layers calls make one pass."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int
    num_layers: int

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def kv_bytes(self) -> int:
        """Bytes of bfloat16 keys and values that a pass must read at least."""
        return self.num_layers * sum(self.kv_lens) * 2 * NUM_KV_HEADS * HEAD_DIM * 2

    @property
    def causal_flops(self) -> int:
        """Multiplications and additions of a pass, without what the causal mask hides."""
        pairs = sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in zip(self.q_lens, self.kv_lens, strict=True))
        return self.num_layers * pairs * 4 * NUM_HEADS * HEAD_DIM


def decode(name: str, kv_lens: Sequence[int], page_size: int, num_layers: int) -> Load:
    return Load(name, (1,) * len(kv_lens), tuple(kv_lens), page_size, num_layers)


def ragged_lens(rows: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Uniform between half and one and a half of the mean, from a fixed seed."""
    return tuple(int(n) for n in np.random.default_rng(seed).integers(mean // 2, mean * 3 // 2, size=rows))


def ours(load: Load, implementation: str) -> Contender:
    """A pass: every layer writes its new keys and values and attends; queries of a layer are the output of the last."""
    num_pages_a_row = [-(-kv_len // load.page_size) for kv_len in load.kv_lens]
    num_pages = sum(num_pages_a_row)
    table = np.zeros((len(load.kv_lens), max(num_pages_a_row)), np.int32)
    shuffled = np.random.default_rng(1).permutation(num_pages)
    for row, (end, count) in enumerate(zip(np.cumsum(num_pages_a_row), num_pages_a_row, strict=True)):
        table[row, :count] = shuffled[end - count : end]
    single = all(q_len == 1 for q_len in load.q_lens)
    rows = len(load.q_lens)
    arrays = (
        jnp.asarray(load.kv_lens, jnp.int32),
        jnp.asarray(table),
        jnp.asarray(np.concatenate([[0], np.cumsum(load.q_lens)]), jnp.int32),
        jnp.asarray([rows if single else 0, rows if single else 0, rows], jnp.int32),
    )
    shape = kv_pages_shape(load.num_layers, num_pages, load.page_size, NUM_KV_HEADS, HEAD_DIM, jnp.bfloat16,
                           implementation=implementation)  # fmt: skip
    max_q_len = 1 if single else None

    def step(state: tuple[jax.Array, jax.Array], new: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        schedule = make_schedule(
            *arrays, num_tokens=load.num_tokens, page_size=load.page_size, num_q_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.bfloat16, kv_dtype=jnp.bfloat16,
            max_q_len=max_q_len, implementation=implementation,
        )  # fmt: skip

        @jax.jit
        def layer(queries: jax.Array, pages: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            attended, written = ragged_paged_attention(
                queries, new, new, pages, index, *arrays, schedule=schedule, scale=SCALE, max_q_len=max_q_len,
                implementation=implementation,
            )  # fmt: skip
            return jnp.asarray(attended), jnp.asarray(written)

        queries, pages = state
        for index in range(load.num_layers):
            queries, pages = layer(queries, pages, jnp.int32(index))
        return queries, pages

    queries, new = (jax.random.normal(jax.random.key(seed), (load.num_tokens, heads, HEAD_DIM), jnp.bfloat16)
                    for seed, heads in ((0, NUM_HEADS), (1, NUM_KV_HEADS)))  # fmt: skip
    compiled = jax.jit(step, donate_argnums=0)
    return of_jax(implementation, lambda state: compiled(state, new, *arrays), (queries, random_pages(shape)))


def random_pages(shape: tuple[int, ...]) -> jax.Array:
    """Normally distributed, made layer by layer: the generator's own temporaries are of float32 size."""

    def fill(pages: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return pages, jax.random.normal(key, shape[1:], jnp.bfloat16)

    return jax.jit(lambda: lax.scan(fill, jnp.zeros(()), jax.random.split(jax.random.key(2), shape[0]))[1])()


def cudnn(load: Load) -> Contender | None:
    """cuDNN through jax over dense keys and values of the longest row's length; None where it refuses."""
    rows, longest = len(load.kv_lens), max(load.kv_lens)
    q_len = max(load.q_lens)
    keys = jax.random.split(jax.random.key(3), 3)
    queries = jax.random.normal(keys[0], (rows, q_len, NUM_HEADS, HEAD_DIM), jnp.bfloat16)
    dense = [random_pages((load.num_layers, rows, longest, NUM_KV_HEADS, HEAD_DIM)) for _ in range(2)]
    lens = jnp.asarray(load.kv_lens, jnp.int32)
    causal = q_len > 1
    options: dict[str, Any] = {"is_causal": True} if causal else {
        "key_value_seq_lengths": lens, "query_seq_lengths": jnp.ones_like(lens)}  # fmt: skip

    @jax.jit
    def step(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        for index in range(load.num_layers):
            queries = jax.nn.dot_product_attention(
                queries, keys[index], values[index], scale=SCALE, implementation="cudnn", **options
            )
        return queries

    try:
        step(queries, *dense).block_until_ready()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        print(f"cuDNN through jax does not run {load.name}: {str(error).splitlines()[0]}")
        return None
    return of_jax("jax cuDNN", lambda state: step(state, *dense), queries)
