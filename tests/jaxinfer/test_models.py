"""The decoder's own properties; parity with transformers is in test_parity, sharding in test_tensor_parallel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_model import MAX_TOKENS, PAGE_SIZE, PagedModel, make_rows, step, tiny_config, two_rows

from jaxinfer.loading import random_params
from jaxinfer.models import make_decoder
from jaxinfer.models.norm import rms_norm
from jaxinfer.params import abstract_params

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], [2, 7], [1]]


@pytest.mark.parametrize("windows", [(8, 8), (0, 8)], ids=["all", "mixed"])
def test_the_scanned_loop_computes_what_the_unrolled_one_does(windows):
    config = tiny_config(windows=windows)
    results = []
    for layer_loop in ("unrolled", "scanned"):
        model = PagedModel(config, random_params(config, 1, layer_loop=layer_loop), len(PROMPTS))
        results.append([*model.prefill_all(PROMPTS, chunk=7), model.decode([11, 12, 13])])
    for unrolled, scanned in zip(*results, strict=True):
        np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def test_a_row_does_not_see_its_neighbours():
    config = tiny_config()
    params = random_params(config, 1)
    together = PagedModel(config, params, 3).prefill_all(PROMPTS, chunk=9)
    alone = PagedModel(config, params, 3).prefill_all([PROMPTS[0], [], []], chunk=9)
    np.testing.assert_array_equal(alone[0], together[0])


def test_a_window_forgets_and_no_window_remembers():
    """With 2 layers of window 8 a token sees at most 2 * 7 back."""
    first, second = [[token, *([5] * 30)] for token in (1, 2)]
    for windows, differs in (((8, 8), False), ((0, 0), True)):
        config = tiny_config(windows=windows)
        model = PagedModel(config, random_params(config, 1), 2)
        one, other = model.prefill_all([first, second], chunk=16)
        assert (np.abs(one[-1] - other[-1]).max() > 1e-6) == differs


def test_bfloat16_stays_close_to_float32():
    config = tiny_config()
    wide = PagedModel(config, random_params(config, 1), 3).prefill_all(PROMPTS, chunk=9)
    params = random_params(config, 1, dtype=jnp.bfloat16)
    narrow = PagedModel(config, params, 3, dtype=jnp.bfloat16).prefill_all(PROMPTS, chunk=9)
    assert narrow[0].dtype == np.float32
    error = np.abs(np.concatenate(narrow) - np.concatenate(wide))
    # Logits have a standard deviation of 1; bfloat16 keeps 8 bits, and errors of some 20 roundings add up.
    assert error.mean() < 0.02 and error.max() < 0.15


def test_rms_norm_has_unit_scale_and_rounds_last():
    x = jax.random.normal(jax.random.key(0), (4, 64)) * 7
    normed = rms_norm(x, jnp.full((64,), 2.0), 0.0)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(normed), axis=1)), 2.0, rtol=1e-6)
    assert rms_norm(x.astype(jnp.bfloat16), jnp.ones(64, jnp.bfloat16), 1e-6).dtype == jnp.bfloat16


@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_a_step_writes_pages_in_place_and_copies_no_weights(layer_loop):
    """Donated pages come back in their own memory; temporaries stay small against pages and weights."""
    config = tiny_config(num_layers=8, windows=(0,) * 8, hidden_size=256, intermediate_size=1024)
    params = abstract_params(config, dtype=jnp.float32, layer_loop=layer_loop)
    decoder = make_decoder(config, dtype=jnp.float32, page_size=PAGE_SIZE)
    pages = decoder.cache(4096, PAGE_SIZE).struct()
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    compiled = jax.jit(step, static_argnums=(0, 6), donate_argnums=4).lower(
        decoder, params, ids, ids, pages, two_rows(), 1
    )
    memory = compiled.compile().memory_analysis()
    assert memory is not None
    page_bytes = decoder.cache(4096, PAGE_SIZE).bytes_per_page * 4096
    layer_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(params["layers"])) // 8
    assert memory.alias_size_in_bytes >= page_bytes
    # XLA:CPU copies one layer's slice of a stack, which is why CPUs unroll.
    allowed = layer_bytes // 4 if layer_loop == "unrolled" else 2 * layer_bytes
    assert memory.temp_size_in_bytes < allowed


def test_padding_tokens_may_hold_any_id():
    """Ids and positions beyond the rows change nothing."""
    config = tiny_config()
    model = PagedModel(config, random_params(config, 1), 1)
    tokens = np.arange(MAX_TOKENS, dtype=np.int32)
    rows = make_rows(
        np.array([5], np.int32), model.page_table[:1], np.array([0, 5], np.int32), np.array([0, 0, 1], np.int32)
    )
    first, _ = model.step(model.params, tokens, tokens, model.decoder.new_pages(20, PAGE_SIZE), rows, None)
    garbage = np.where(tokens < 5, tokens, 10_000_000)
    second, _ = model.step(
        model.params, garbage, np.where(tokens < 5, tokens, 0), model.decoder.new_pages(20, PAGE_SIZE), rows, None
    )
    np.testing.assert_array_equal(first[:5], second[:5])
    assert np.isfinite(second).all()
