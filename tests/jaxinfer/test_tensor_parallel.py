"""Tensor parallelism on virtual CPU devices: the same logits, and exactly the collectives that are written."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from paged_model import PAGE_SIZE, PagedModel, step, tiny_config, two_rows

from jaxinfer import sharding
from jaxinfer.linear import QuantizedWeight
from jaxinfer.loading import load_model, random_params
from jaxinfer.models import make_decoder
from jaxinfer.params import abstract_params, partition_specs
from pallas_kernels.int8_matmul import quantize_weight

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7], [1]]
COLLECTIVE = re.compile(r"= \S+ (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def mesh_of(shards: int):
    if len(jax.devices()) < shards:
        pytest.skip(f"needs {shards} devices")
    return sharding.make_mesh(shards)


def run(config, mesh, layer_loop):
    model = PagedModel(config, random_params(config, 1, mesh=mesh, layer_loop=layer_loop), len(PROMPTS), mesh=mesh)
    return np.concatenate([*model.prefill_all(PROMPTS, chunk=9), model.decode([5, 6, 7])])


@pytest.fixture(scope="module")
def single():
    """Logits on one device, with an untied and a tied head."""
    return {tied: run(tiny_config(tie_word_embeddings=tied), None, "unrolled") for tied in (False, True)}


@pytest.mark.parametrize(("shards", "tied", "layer_loop"), [
    (2, False, "unrolled"), (4, True, "scanned"), (8, False, "scanned"), (8, True, "unrolled"),
])  # fmt: skip
def test_logits_do_not_depend_on_the_number_of_shards(single, shards, tied, layer_loop):
    """2 kv heads, 250 ids: at 4 and 8 shards heads are repeated and the vocabulary is padded."""
    found = run(tiny_config(tie_word_embeddings=tied), mesh_of(shards), layer_loop)
    error = np.abs(found - single[tied]).max()
    print(f"{shards} shards, tied={tied}, {layer_loop}: {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_a_layer_has_two_all_reduces_and_nothing_else(shards, layer_loop):
    """One more sums the embedding, one all-gather completes the logits; both are there once, not once a layer."""
    mesh = mesh_of(shards)
    counts = []
    for num_layers in (2, 4):
        config = tiny_config(num_layers=num_layers, windows=(0,) * num_layers)
        counts.append(collectives(config, mesh, layer_loop))
    # The body of a scan stands in the program once.
    per_layer = [2, 4] if layer_loop == "unrolled" else [1, 1]
    expected = [{"all-reduce": 2 * layers + 1, "all-gather": 1} for layers in per_layer]
    assert [dict(count) for count in counts] == expected


def collectives(config, mesh, layer_loop) -> Counter:
    """Collectives in the compiled decode step of two rows."""
    params = abstract_params(config, dtype=jnp.float32, mesh=mesh, layer_loop=layer_loop)
    decoder = make_decoder(config, dtype=jnp.float32, page_size=PAGE_SIZE, mesh=mesh)
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    pages = decoder.cache(16, PAGE_SIZE).struct()
    lowered = jax.jit(step, static_argnums=(0, 6), donate_argnums=4).lower(
        decoder, params, ids, ids, pages, two_rows(), 1
    )
    return Counter(COLLECTIVE.findall(str(lowered.compile().as_text())))


def test_a_checkpoint_loads_onto_more_shards_than_kv_heads(repository):
    """4 query heads and 2 kv heads over 4 devices, read straight to the shards."""
    mesh = mesh_of(4)
    folder = repository / "tests" / "data" / "parity" / "qwen2-bias"
    golden = np.load(folder / "golden.npz")
    loaded = load_model(folder, dtype=jnp.float32, mesh=mesh)
    key = loaded.params["layers"][0]["k"]["weight"]
    assert key.shape == (64, 4 * 16) and key.addressable_shards[0].data.shape == (64, 16)
    np.testing.assert_array_equal(key.addressable_shards[0].data, key.addressable_shards[1].data)
    model = PagedModel(loaded.config, loaded.params, 1, mesh=mesh)
    logits = model.prefill_all([golden["prompt_2"].tolist()], chunk=40)[0]
    assert np.abs(logits - golden["logits_2"]).max() <= 2e-3


def test_quantised_weights_are_cut_like_float_ones():
    """int8 values lie [out, in]: their shards are cut the other way round."""
    config, mesh = tiny_config(), mesh_of(2)
    params = random_params(config, 1, layer_loop="unrolled")
    params["layers"] = tuple(quantised(layer) for layer in params["layers"])
    specs = partition_specs(params, config, mesh)
    cut = jax.tree.map(lambda leaf, spec: jax.device_put(np.asarray(leaf), NamedSharding(mesh, spec)), params, specs)
    for name in ("up", "down"):  # [128, 64] by its first and [64, 128] by its second dimension
        assert cut["layers"][0][name]["weight"].values.addressable_shards[0].data.shape == (64, 64)
    whole = PagedModel(config, params, len(PROMPTS)).prefill_all(PROMPTS, chunk=14)
    shards = PagedModel(config, cut, len(PROMPTS), mesh=mesh).prefill_all(PROMPTS, chunk=14)
    np.testing.assert_allclose(np.concatenate(shards), np.concatenate(whole), atol=1e-4)


def quantised(layer):
    """The layer with int8 projections."""
    layer = dict(layer)
    for name, part in layer.items():
        if isinstance(part, dict):
            values, scale = map(jnp.asarray, quantize_weight(part["weight"].T))
            layer[name] = part | {"weight": QuantizedWeight(values, scale)}
    return layer


def test_pages_are_cut_along_their_kv_heads():
    mesh = mesh_of(4)
    decoder = make_decoder(tiny_config(), dtype=jnp.bfloat16, page_size=PAGE_SIZE, mesh=mesh)
    cache = decoder.cache(10, PAGE_SIZE)
    pages = cache.allocate()
    assert pages.shape == cache.shape and pages.dtype == jnp.bfloat16
    assert cache.bytes_per_page * 10 == pages.nbytes
    assert {shard.data.nbytes for shard in pages.addressable_shards} == {pages.nbytes // 4}
    # 2 kv heads on 4 shards are stored twice: keys and values of 2 layers, 8 tokens, 4 heads of 16, 2 bytes each.
    assert cache.bytes_per_page == 2 * 2 * 8 * 4 * 16 * 2
