"""One record a weight: sizes, the two layer loops, random init, errors."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_model import tiny_config

from jaxinfer.errors import ModelFormatError
from jaxinfer.loading import random_params
from jaxinfer.params import (
    check_params,
    default_layer_loop,
    fit,
    flatten_specs,
    layer_loop_of,
    param_specs,
    source_paths,
    total_bytes,
)


def test_specs_count_the_bytes_of_a_known_model():
    """Llama 3.2 1B: 1,235,814,400 weights, as its publisher counts them."""
    config = tiny_config(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
        head_dim=64, windows=(0,) * 16, tie_word_embeddings=True, attention_bias=False, attention_out_bias=False,
        mlp_bias=False, qk_norm=False,
    )  # fmt: skip
    for layer_loop in ("unrolled", "scanned"):
        assert total_bytes(param_specs(config, dtype=jnp.bfloat16, layer_loop=layer_loop)) == 2 * 1_235_814_400


def test_optional_weights_appear_only_where_the_config_has_them():
    full = dict(flatten_specs(param_specs(tiny_config())))
    assert {"head", "layers/0/q/bias", "layers/1/o/bias", "layers/1/down/bias", "layers/0/q_norm"} <= full.keys()
    bare = tiny_config(
        tie_word_embeddings=True, attention_bias=False, attention_out_bias=False, mlp_bias=False, qk_norm=False
    )
    assert not any("bias" in path or "q_norm" in path or path == "head" for path, _ in flatten_specs(param_specs(bare)))


def test_specs_name_the_axes_that_are_contracted_and_produced():
    specs = dict(flatten_specs(param_specs(tiny_config(), layer_loop="scanned")))
    down = specs["layers/down/weight"]
    assert down.shape == (2, 128, 64) and down.axes == ("layers", "ffn", "model")
    assert (down.in_axis, down.out_axis) == (1, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_random_weights_are_the_same_model_in_both_loops(dtype):
    config = tiny_config()
    unrolled = random_params(config, 3, dtype=dtype, layer_loop="unrolled")
    scanned = random_params(config, 3, dtype=dtype, layer_loop="scanned")
    assert (layer_loop_of(unrolled), layer_loop_of(scanned)) == ("unrolled", "scanned")
    restacked = jax.tree.map(lambda *layers: jnp.stack(layers), *unrolled["layers"])
    jax.tree.map(np.testing.assert_array_equal, restacked, scanned["layers"])
    assert {leaf.dtype for leaf in jax.tree.leaves(unrolled)} == {jnp.dtype(dtype)}


def test_random_weights_differ_by_seed_and_place_and_have_the_law_of_their_spec():
    weights = random_params(tiny_config(), 0)
    other = random_params(tiny_config(), 1)
    q, down = weights["layers"][0]["q"]["weight"], weights["layers"][0]["down"]["weight"]
    assert not np.array_equal(q, other["layers"][0]["q"]["weight"])
    assert not np.array_equal(q, weights["layers"][1]["q"]["weight"])
    assert np.std(down) == pytest.approx(128**-0.5, rel=0.05)
    np.testing.assert_array_equal(weights["final_norm"], 1)
    np.testing.assert_array_equal(weights["layers"][0]["q"]["bias"], 0)


def test_a_wrong_shape_is_named_with_both_shapes():
    config = tiny_config()
    weights = random_params(config, 0)
    check_params(weights, param_specs(config, dtype=jnp.float32))
    weights["layers"][1]["up"]["weight"] = jnp.zeros((64, 100))
    with pytest.raises(ModelFormatError, match=r"layers/1/up/weight: expected shape \(64, 128\), found \(64, 100\)"):
        check_params(weights, param_specs(config, dtype=jnp.float32))


def test_a_stacked_weight_has_one_source_a_layer():
    assert source_paths("layers/q/weight", 2) == ["layers/0/q/weight", "layers/1/q/weight"]
    assert source_paths("layers/1/q/weight", 2) == ["layers/1/q/weight"]
    assert source_paths("embed", 2) == ["embed"]


def test_fitting_repeats_whole_heads_and_pads_ids():
    specs = dict(flatten_specs(param_specs(tiny_config(num_kv_heads=2, head_dim=2, hidden_size=1))))
    heads = fit(jnp.array([[1, 2, 3, 4]]), specs["layers/0/k/weight"], 2, (1, 8))
    np.testing.assert_array_equal(heads, [[1, 2, 1, 2, 3, 4, 3, 4]])
    ids = fit(jnp.ones((3, 1)), specs["embed"], 2, (4, 1))
    np.testing.assert_array_equal(ids[:, 0], [1, 1, 1, 0])
    with pytest.raises(ModelFormatError, match="'ffn'"):
        fit(jnp.ones((1, 3)), specs["layers/0/up/weight"], 2, (1, 4))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpu", "unrolled"),
        ("NVIDIA H200", "unrolled"),
        ("TPU v5 lite", "scanned"),
        ("TPU v5p", "scanned"),
        ("TPU v6 lite", "scanned"),
        ("TPU7x", "scanned"),
        ("TPU v4", "unrolled"),
    ],
)
def test_the_layer_loop_follows_the_devices_of_the_mesh(kind, expected):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    mesh = SimpleNamespace(devices=np.array([[[device]]]))
    assert default_layer_loop(mesh) == expected  # type: ignore[arg-type]
    assert default_layer_loop() == "unrolled"
