"""Quantised at conversion: the same weights as at load, remembered, and never quantised twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cli, conversion, kv_scales, sharding
from jaxinfer.errors import InvalidConfig, ModelFormatError
from jaxinfer.loading import load_model


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "tests" / "data" / "parity" / "qwen2-bias"


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "int8"
    conversion.convert(folder, target, dtype="bfloat16", quantization="int8", with_kv_ranges=True)
    return target


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype and left.sharding.is_equivalent_to(right.sharding, left.ndim)
        np.testing.assert_array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


@pytest.mark.parametrize(("shards", "layer_loop"), [(1, "unrolled"), (2, "scanned"), (4, "unrolled")])
@pytest.mark.parametrize("wanted", [None, "int8"])
def test_a_quantised_conversion_is_what_loading_quantises(folder, converted, shards, layer_loop, wanted):
    if len(jax.devices()) < shards:
        pytest.skip(f"needs {shards} devices")
    mesh = sharding.make_mesh(shards) if shards > 1 else None
    place = {"dtype": jnp.bfloat16, "mesh": mesh, "layer_loop": layer_loop}
    original = load_model(folder, quantization="int8", **place)
    restored = load_model(converted, quantization=wanted, **place)
    assert restored.quantization == original.quantization == "int8"
    assert_same(restored.params, original.params)


def test_a_conversion_keeps_the_ranges_of_keys_and_values(folder, converted):
    loaded = load_model(folder, dtype=jnp.bfloat16, quantization="int8")
    ranges = kv_scales.ranges_of_model(loaded.config, loaded.params, None, dtype=jnp.bfloat16)
    restored = load_model(converted, dtype=jnp.bfloat16).kv_ranges
    assert loaded.kv_ranges is None and restored is not None
    for found, expected in zip(restored, ranges, strict=True):
        assert found.shape == (4, 2)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("shards", "layer_loop"), [(1, "scanned"), (4, "unrolled")])
def test_a_float_conversion_may_be_quantised_at_load(folder, tmp_path, shards, layer_loop):
    mesh = sharding.make_mesh(shards) if shards > 1 else None
    conversion.convert(folder, tmp_path / "float")
    place = {"dtype": jnp.bfloat16, "mesh": mesh, "layer_loop": layer_loop, "quantization": "int8_weight_only"}
    assert_same(load_model(tmp_path / "float", **place).params, load_model(folder, **place).params)


def test_another_quantization_than_the_stored_one_is_refused(converted):
    with pytest.raises(InvalidConfig, match=r"'int8_weight_only', but .* was converted with 'int8'; leave it out"):
        load_model(converted, quantization="int8_weight_only")


def test_what_is_converted_is_not_converted_again(converted, tmp_path):
    with pytest.raises(ModelFormatError, match="is converted already; name the folder it was converted from"):
        conversion.convert(converted, tmp_path / "again", quantization="int8_weight_only")


def test_an_unknown_name_is_refused_before_anything_is_read(tmp_path, capsys):
    with pytest.raises(InvalidConfig, match="'int4' is not one of int8, int8_weight_only"):
        conversion.convert(tmp_path / "missing", tmp_path / "out", quantization="int4")
    assert cli.main(["convert", "demo", str(tmp_path / "out"), "--quantization", "int4"]) == 1
    assert "'int4' is not one of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value", "problem"), [
    ('"quantization": "int8"', '"quantization": "int3"', "quantization 'int3' is not known; convert the model again"),
    ('"quantization": "int8"', '"quantization": 8', "quantization is 8, expected a name or null"),
    ('"quantization": "int8"', '"quantization": null', "no place for|are missing"),
    ('"dtype": "int8"', '"dtype": "int16"', "expected int8, found int16"),
])  # fmt: skip
def test_a_damaged_manifest_is_named(converted, tmp_path, field, value, problem):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in converted.iterdir():
        if file.name != "checkpoint.json":
            (copy / file.name).symlink_to(file)
    text = (converted / "checkpoint.json").read_text()
    assert field in text
    (copy / "checkpoint.json").write_text(text.replace(field, value))
    with pytest.raises(ModelFormatError, match=problem):
        load_model(copy)
