"""The compiled programs write the pages where they are: no temporaries and no copies of the size of the pages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.ragged_paged_attention import kv_pages_shape, make_schedule, ragged_paged_attention

IMPLEMENTATIONS = ("xla",)
NUM_LAYERS, NUM_PAGES, PAGE_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 3, 4096, 16, 4, 2, 16
MODES = {"decode": (8, 1), "verify": (24, 3), "prefill": (40, None)}  # name: (T, max_q_len), with 8 rows


def step(queries, keys, pages, lens, table, layers: str, max_q_len: int | None, name: str):
    """Three layers, each fed by the one before; new keys come from the layer's input as in a model."""
    num_tokens, num_rows = queries.shape[0], lens.shape[0]
    cu_q_lens = jnp.linspace(0, num_tokens, num_rows + 1).astype(jnp.int32)
    distribution = jnp.array([num_rows if max_q_len == 1 else 0, num_rows if max_q_len else 0, num_rows], jnp.int32)
    rows = (lens, table, cu_q_lens, distribution)
    schedule = make_schedule(
        *rows, num_tokens=num_tokens, page_size=PAGE_SIZE, num_q_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM, dtype=queries.dtype, kv_dtype=pages.dtype, max_q_len=max_q_len, implementation=name,
    )  # fmt: skip

    def layer(carry, index):
        hidden, pages = carry
        outputs, pages = ragged_paged_attention(
            hidden, keys + hidden[:, :NUM_KV_HEADS], keys, pages, index, *rows, schedule=schedule, scale=0.25,
            window=index * 8, max_q_len=max_q_len, implementation=name,
        )  # fmt: skip
        return (hidden + outputs, pages), None

    if layers == "scan":
        return lax.scan(layer, (queries, pages), jnp.arange(NUM_LAYERS))[0]
    carry = (queries, pages)
    for index in range(NUM_LAYERS):
        carry, _ = layer(carry, index)
    return carry


def arguments(num_tokens: int, implementation: str):
    shape = kv_pages_shape(
        NUM_LAYERS, NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, jnp.bfloat16, implementation=implementation
    )
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(num_tokens, NUM_HEADS, HEAD_DIM)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=(num_tokens, NUM_KV_HEADS, HEAD_DIM)), jnp.bfloat16),
        jnp.zeros(shape, jnp.bfloat16),
        jnp.arange(20, 28, dtype=jnp.int32),
        jnp.arange(8 * 16, dtype=jnp.int32).reshape(8, 16),
    )


def assert_in_place(compiled, pages: jax.Array) -> None:
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pages.nbytes, "donated pages are not reused for the result"
    assert memory.temp_size_in_bytes < pages.nbytes / 4
    shape = ",".join(str(size) for size in pages.shape)
    copies = re.findall(rf"= bf16\[{shape}\]\S* copy(?:-start)?\(.*", compiled.as_text())
    assert not copies, copies


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layers", ["unrolled", "scan"])
@pytest.mark.parametrize("mode", MODES)
def test_layers_write_in_place(mode: str, layers: str, implementation: str):
    num_tokens, max_q_len = MODES[mode]
    args = arguments(num_tokens, implementation)

    def program(*args):
        queries, keys, pages, lens, table = args
        return step(queries, keys, pages, lens, table, layers, max_q_len, implementation)

    assert_in_place(jax.jit(program, donate_argnums=2).lower(*args).compile(), args[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_loop_of_decode_steps_writes_in_place(layers: str, implementation: str):
    args = arguments(8, implementation)

    def program(queries, keys, pages, lens, table, num_steps):
        def body(carry):
            i, hidden, pages, lens = carry
            hidden, pages = step(hidden, keys, pages, lens, table, layers, 1, implementation)
            return i + 1, hidden, pages, lens + 1

        return lax.while_loop(lambda carry: carry[0] < num_steps, body, (0, queries, pages, lens))

    assert_in_place(jax.jit(program, donate_argnums=2).lower(*args, jnp.int32(4)).compile(), args[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_that_do_not_feed_each_other_write_in_place(implementation: str):
    """A layer whose keys depend on no earlier output must not be written before the earlier layer has read."""
    queries, keys, pages, lens, table = arguments(8, implementation)
    rows = (lens, table, jnp.arange(9, dtype=jnp.int32), jnp.array([8, 8, 8], jnp.int32))

    def program(queries, keys, pages):
        total = jnp.zeros_like(queries)
        for layer in range(NUM_LAYERS):
            outputs, pages = ragged_paged_attention(
                queries, keys, keys, pages, layer, *rows, scale=0.25, max_q_len=1, implementation=implementation
            )
            total += outputs
        return total, pages

    assert_in_place(jax.jit(program, donate_argnums=2).lower(queries, keys, pages).compile(), pages)
