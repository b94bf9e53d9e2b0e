"""Attention on the card: our kernel over pages, a stack of layers in one program, and what must be moved for it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.h200.contenders import Contender, of_jax
from pallas_kernels.ragged_paged_attention import make_schedule, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.contract import Options
from pallas_kernels.ragged_paged_attention.gpu_prefill import attend_many
from pallas_kernels.ragged_paged_attention.gpu_prefill_schedule import make_prefill_schedule
from pallas_kernels.ragged_paged_attention.gpu_prefill_unit import PrefillBlocks

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
    def is_decode(self) -> bool:
        return max(self.q_lens) == 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of bfloat16 keys and values that a pass must read at least."""
        return self.num_layers * sum(self.kv_lens) * 2 * NUM_KV_HEADS * HEAD_DIM * 2

    @property
    def causal_flops(self) -> int:
        """Multiplications and additions of a pass, without what the causal mask hides."""
        pairs = sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in zip(self.q_lens, self.kv_lens, strict=True))
        return self.num_layers * pairs * 4 * NUM_HEADS * HEAD_DIM


type Rows = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
type State = tuple[jax.Array, jax.Array]
type Layer = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], State]
"""Queries, new keys (and values), pages, layer index to outputs and pages."""
type Way = Callable[[Load, Rows], Layer]
"""Makes the schedule, once a pass, and a layer's function of it."""


def decode(name: str, kv_lens: Sequence[int], page_size: int, num_layers: int) -> Load:
    return Load(name, (1,) * len(kv_lens), tuple(kv_lens), page_size, num_layers)


def ragged_lens(rows: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Uniform between half and one and a half of the mean, from a fixed seed."""
    return tuple(int(n) for n in np.random.default_rng(seed).integers(mean // 2, mean * 3 // 2, size=rows))


def public(load: Load, arrays: Rows, implementation: str = "gpu") -> Layer:
    """The operation as its callers have it."""
    static = {"max_q_len": 1 if load.is_decode else None, "implementation": implementation}
    schedule = make_schedule(
        *arrays, num_tokens=load.num_tokens, page_size=load.page_size, num_q_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.bfloat16, kv_dtype=jnp.bfloat16, **static,
    )  # fmt: skip

    def layer(queries: jax.Array, new: jax.Array, pages: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        attended, written = ragged_paged_attention(queries, new, new, pages, index, *arrays, schedule=schedule,
                                                   scale=SCALE, **static)  # fmt: skip
        return jnp.asarray(attended), jnp.asarray(written)

    return layer


def prefill_in_registers(load: Load, arrays: Rows) -> Layer:
    """Our prefill kernel in the form that Pallas' interpreter cannot run, by the rule's blocks."""
    group = NUM_HEADS // NUM_KV_HEADS
    schedule = make_prefill_schedule(*arrays, num_tokens=load.num_tokens, group=group, page_size=load.page_size,
                                     first_row_class=0)  # fmt: skip
    blocks = PrefillBlocks.choose(HEAD_DIM, jnp.bfloat16, register_operands=True)
    options = Options.make(SCALE, None, None, None, None, None)

    def layer(queries: jax.Array, new: jax.Array, pages: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        pages_ref = jax.new_ref(pages)
        outputs = attend_many(queries, new, new, pages_ref, index, arrays[1], schedule, options,
                              jnp.zeros_like(queries), blocks=blocks)  # fmt: skip
        return outputs, jax.freeze(pages_ref)

    return layer


def ours(load: Load, name: str, way: Way = public) -> Contender:
    """A pass: every layer writes its new keys and values and attends; queries of a layer are the output of the last."""
    step, state = program(load, way)
    return of_jax(name, step, state)


def program(load: Load, way: Way) -> tuple[Callable[[State], State], State]:
    """A compiled pass from queries and pages to outputs and pages, and its first state (donated)."""
    arrays = rows_of(load)

    def step(state: State, new: jax.Array, arrays: Rows) -> State:
        layer = jax.jit(way(load, arrays))
        queries, pages = state
        for index in range(load.num_layers):
            queries, pages = layer(queries, new, pages, jnp.int32(index))
        return queries, pages

    queries, new = (jax.random.normal(jax.random.key(seed), (load.num_tokens, heads, HEAD_DIM), jnp.bfloat16)
                    for seed, heads in ((0, NUM_HEADS), (1, NUM_KV_HEADS)))  # fmt: skip
    num_pages = sum(pages_of(load))
    pages = random_pages((load.num_layers, num_pages, 2, NUM_KV_HEADS, load.page_size, HEAD_DIM))
    compiled = jax.jit(step, donate_argnums=0)
    return lambda state: compiled(state, new, arrays), (queries, pages)


def pages_of(load: Load) -> list[int]:
    """Pages of each row."""
    return [-(-kv_len // load.page_size) for kv_len in load.kv_lens]


def rows_of(load: Load) -> Rows:
    """kv_lens, page_indices, cu_q_lens, distribution of the contract; pages in a shuffled order."""
    counts, rows = pages_of(load), len(load.q_lens)
    table = np.zeros((rows, max(counts)), np.int32)
    shuffled = np.random.default_rng(1).permutation(sum(counts))
    for row, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
        table[row, :count] = shuffled[end - count : end]
    single = rows if load.is_decode else 0
    starts = np.concatenate([[0], np.cumsum(load.q_lens)])
    return (jnp.asarray(load.kv_lens, jnp.int32), jnp.asarray(table), jnp.asarray(starts, jnp.int32),
            jnp.asarray([single, single, rows], jnp.int32))  # fmt: skip


def unlike(load: Load, one: Way, other: Way) -> int:
    """Of one layer's outputs the tokens whose largest error is more than 1 % of the token's largest component (NumPy
    throughout: a comparison with NaN must fail).
    """
    outputs = []
    for way in (one, other):
        step, state = program(dataclasses.replace(load, num_layers=1), way)
        outputs.append(np.asarray(step(state)[0]).astype(np.float64).reshape(load.num_tokens, -1))
    actual, wanted = outputs
    near = np.abs(actual - wanted).max(axis=1) <= 1e-2 * np.abs(wanted).max(axis=1)
    return int((~near).sum())


@partial(jax.jit, static_argnums=0)
def random_pages(shape: tuple[int, ...]) -> jax.Array:
    """Normally distributed, made layer by layer: the generator's own temporaries are of float32 size."""

    def fill(pages: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return pages, jax.random.normal(key, shape[1:], jnp.bfloat16)

    return lax.scan(fill, jnp.zeros(()), jax.random.split(jax.random.key(2), shape[0]))[1]


def cudnn(load: Load) -> Contender | None:
    """cuDNN through jax over dense keys and values of the longest row's length; None where it refuses."""
    rows, longest = len(load.kv_lens), max(load.kv_lens)
    q_len = max(load.q_lens)
    keys = jax.random.split(jax.random.key(3), 3)
    queries = jax.random.normal(keys[0], (rows, q_len, NUM_HEADS, HEAD_DIM), jnp.bfloat16)
    # A buffer a layer: of one for all, the layer's slice would be copied before the call.
    dense = [[random_pages((rows, longest, NUM_KV_HEADS, HEAD_DIM)) for _ in range(load.num_layers)] for _ in range(2)]
    lens = jnp.asarray(load.kv_lens, jnp.int32)
    causal = q_len > 1
    options: dict[str, Any] = {"is_causal": True} if causal else {
        "key_value_seq_lengths": lens, "query_seq_lengths": jnp.ones_like(lens)}  # fmt: skip

    @jax.jit
    def step(queries: jax.Array, keys: list[jax.Array], values: list[jax.Array]) -> jax.Array:
        for k, v in zip(keys, values, strict=True):
            queries = jax.nn.dot_product_attention(queries, k, v, scale=SCALE, implementation="cudnn", **options)
        return queries

    try:
        step(queries, *dense).block_until_ready()
    except Exception as error:  # cuDNN and its wrapper refuse in many ways; the other peers still run
        print(f"cuDNN through jax does not run {load.name}: {type(error).__name__}: {str(error)[:160]}")
        return None
    return of_jax("jax cuDNN", lambda state: step(state, *dense), queries)
