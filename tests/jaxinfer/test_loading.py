"""A model folder to placed parameters: every way in gives the same weights, every defect is named."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_model import PagedModel
from safetensors.numpy import load_file, save_file

from checkpoints.convert import convert
from jaxinfer import sharding
from jaxinfer.errors import ModelFormatError
from jaxinfer.loading import load_model, stored_dtype
from jaxinfer.params import flatten_specs, param_specs


@pytest.fixture
def folder(tmp_path, repository):
    """A copy of a small model that a test may damage."""
    return shutil.copytree(repository / "tests" / "data" / "parity" / "qwen2-bias", tmp_path / "model")


def edit_weights(folder, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype and left.sharding.is_equivalent_to(right.sharding, left.ndim)
        np.testing.assert_array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


def test_a_folder_gives_config_weights_and_defaults(folder):
    loaded = load_model(folder, dtype=jnp.float32, layer_loop="unrolled")
    assert (loaded.config.family, loaded.config.num_layers, loaded.config.tie_word_embeddings) == ("qwen2", 4, True)
    assert loaded.folder == folder
    weights = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(loaded.params["embed"], weights["model.embed_tokens.weight"])
    up = weights["model.layers.2.mlp.up_proj.weight"]
    np.testing.assert_array_equal(loaded.params["layers"][2]["up"]["weight"], up.T)
    found = {path: leaf.shape for (path, _), leaf in zip(
        flatten_specs(param_specs(loaded.config)), jax.tree.leaves(loaded.params), strict=True)}  # fmt: skip
    assert found == {path: spec.shape for path, spec in flatten_specs(param_specs(loaded.config))}


def test_both_layer_loops_and_sharded_files_hold_the_same_weights(folder):
    unrolled = load_model(folder, dtype=jnp.bfloat16, layer_loop="unrolled").params
    scanned = load_model(folder, dtype=jnp.bfloat16, layer_loop="scanned").params
    restacked = jax.tree.map(lambda *layers: jnp.stack(layers), *unrolled["layers"])
    assert_same({**scanned, "layers": restacked}, scanned)

    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert_same(load_model(folder, dtype=jnp.bfloat16, layer_loop="unrolled").params, unrolled)


@pytest.mark.parametrize(("shards", "layer_loop"), [(1, "unrolled"), (2, "scanned"), (4, "unrolled")])
def test_a_converted_model_is_bit_identical(folder, tmp_path, shards, layer_loop):
    """Also onto a mesh, and onto more shards than kv heads (4 against 2)."""
    if len(jax.devices()) < shards:
        pytest.skip(f"needs {shards} devices")
    mesh = sharding.make_mesh(shards) if shards > 1 else None
    convert(folder, tmp_path / "converted")
    original = load_model(folder, dtype=jnp.float32, mesh=mesh, layer_loop=layer_loop)
    converted = load_model(tmp_path / "converted", dtype=jnp.float32, mesh=mesh, layer_loop=layer_loop)
    assert converted.config == original.config
    assert_same(converted.params, original.params)
    prompt = [[1, 2, 3, 4, 5]]
    logits = [PagedModel(m.config, m.params, 1, mesh=mesh).prefill_all(prompt, 5)[0] for m in (original, converted)]
    np.testing.assert_array_equal(logits[0], logits[1])


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DEFECTS = {
    "a missing weight": (
        lambda folder: edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        r"1 tensors are missing: model.layers.1.mlp.up_proj.weight; download",
    ),
    "a wrong shape": (
        lambda folder: edit_weights(
            folder, lambda w: w.update({"model.layers.0.self_attn.k_proj.weight": np.zeros((33, 64), np.float32)})
        ),
        r"1 tensors .*: model.layers.0.self_attn.k_proj.weight: expected shape \(32, 64\), found \(33, 64\); download",
    ),
    "a wrong rank": (
        lambda folder: edit_weights(folder, lambda w: w.update({"model.norm.weight": np.zeros((8, 8), np.float32)})),
        r"model.norm.weight: expected shape \(64,\), found \(8, 8\)",
    ),
    "integers": (
        lambda folder: edit_weights(folder, lambda w: w.update({"model.norm.weight": np.zeros(64, np.int32)})),
        "model.norm.weight.*expected a float dtype, found int32",
    ),
    "an unknown tensor": (
        lambda folder: edit_weights(folder, lambda w: w.update({"model.vision": np.zeros(1, np.float32)})),
        "1 tensors unknown to qwen2 models: model.vision",
    ),
    "a bias too many": (
        lambda folder: edit_weights(
            folder, lambda w: w.update({"model.layers.0.self_attn.o_proj.bias": np.zeros(64, np.float32)})
        ),
        "config.json has no place for 1 tensors: model.layers.0.self_attn.o_proj.bias",
    ),
    "more layers than stored": (
        lambda folder: edit_config(folder, num_hidden_layers=5, layer_types=None),
        r"12 tensors are missing: model.layers.4.input_layernorm.weight, model.layers.4.mlp.down_proj.weight, "
        r".* and 7 more; download",
    ),
    "fewer layers than stored": (lambda folder: edit_config(folder, num_hidden_layers=3), "no place for 12 tensors"),
    "an untied head": (lambda folder: edit_config(folder, tie_word_embeddings=False), r"missing: lm_head.weight;"),
    "many wrong shapes": (
        lambda folder: edit_config(folder, intermediate_size=100),
        r"12 tensors .*: model.layers.0.mlp.down_proj.weight: expected shape \(64, 100\), found \(64, 160\); model.* "
        r"and 7 more; download",
    ),
    "another vocabulary": (
        lambda folder: edit_config(folder, vocab_size=300),
        r"expected shape \(300, 64\), found \(256, 64\)",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors"),
    "a broken config": (
        lambda folder: (folder / "config.json").write_text('{\n "model_type": qwen2}'),
        r"config.json: is not valid JSON: .*line 2 column 16",
    ),
    "a git-LFS pointer": (
        lambda folder: (folder / "model.safetensors").write_text(LFS_POINTER),
        r"model.safetensors: is a git-LFS pointer.*git lfs pull",
    ),
    "no sense": (lambda folder: edit_config(folder, num_hidden_layers=-1), "num_hidden_layers must be"),
    "truncated weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5]),
        "truncated",
    ),
    "half a conversion": (lambda folder: (folder / "checkpoint.json").write_text("{}"), "is None version None"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_a_model_format_error_that_names_it(folder, name):
    damage, problem = DEFECTS[name]
    damage(folder)
    with pytest.raises(ModelFormatError, match=problem) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("fields", "dtype"), [
    ({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16"), ({"dtype": None, "torch_dtype": "float16"}, "float16")])
def test_the_stored_dtype_in_both_spellings(folder, fields, dtype):
    edit_config(folder, **fields)
    assert stored_dtype(folder) == dtype


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ModelFormatError, match="nowhere is not a folder; give a model folder or one of demo, demo-draft"
    ):
        load_model(tmp_path / "nowhere")


def test_a_converted_model_is_checked_against_its_config(folder, tmp_path):
    convert(folder, tmp_path / "converted")
    edit_config(tmp_path / "converted", intermediate_size=100)
    with pytest.raises(ModelFormatError, match=r"layers/0/down/weight: expected shape \(100, 64\), found \(160, 64\)"):
        load_model(tmp_path / "converted")
