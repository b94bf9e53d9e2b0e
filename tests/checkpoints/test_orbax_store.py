"""Our own form: saved whole or not at all, restored by sharding, never trusted when half written."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints import CheckpointError, orbax_store
from checkpoints.convert import convert

ARRAYS = {
    "embed": np.arange(24, dtype=np.float32).reshape(4, 6),
    "layers/0/q/weight": np.arange(8).astype(ml_dtypes.bfloat16).reshape(2, 4),
    "layers/10/q/weight": np.asfortranarray(np.arange(8).astype(ml_dtypes.bfloat16).reshape(2, 4)),
}


def targets(sharding, dtype=None) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=sharding)
        for path, array in ARRAYS.items()
    }


@pytest.fixture
def store(tmp_path):
    orbax_store.save(tmp_path, ARRAYS)
    return tmp_path


def first_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


def test_arrays_come_back_bit_by_bit(store):
    assert orbax_store.is_store(store)
    assert {path: (info.shape, info.dtype) for path, info in orbax_store.stored(store).items()} == {
        path: (array.shape, array.dtype) for path, array in ARRAYS.items()
    }
    for path, array in orbax_store.restore(store, targets(first_device())).items():
        assert array.dtype == ARRAYS[path].dtype
        np.testing.assert_array_equal(array, ARRAYS[path])


def test_arrays_come_back_on_their_shards_and_in_another_dtype(store):
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    for path, array in orbax_store.restore(store, targets(sharding, jnp.bfloat16)).items():
        assert array.sharding == sharding and array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, ARRAYS[path].astype(ml_dtypes.bfloat16))


def test_a_folder_is_not_overwritten(store):
    with pytest.raises(CheckpointError, match="already"):
        orbax_store.save(store, ARRAYS)


def test_a_wrong_shape_or_path_is_named(store):
    wrong = targets(first_device())
    wrong["embed"] = jax.ShapeDtypeStruct((4, 7), np.float32, sharding=first_device())
    with pytest.raises(CheckpointError, match=r"embed: expected shape \(4, 7\), found.*\(4, 6\)"):
        orbax_store.restore(store, wrong)
    with pytest.raises(CheckpointError, match=r"head: expected shape.*found None"):
        orbax_store.restore(store, {"head": wrong["embed"]})


def manifest(**changes):
    return lambda store: (store / "checkpoint.json").write_text(
        json.dumps({**json.loads((store / "checkpoint.json").read_text()), **changes})
    )


BROKEN = {
    "no manifest": (lambda store: (store / "checkpoint.json").unlink(), "never finished"),
    "params under their temporary name": (
        lambda store: (store / "params").rename(store / "params.orbax-checkpoint-tmp"),
        "never finished",
    ),
    "params without their own mark": (
        lambda store: (store / "params" / "_CHECKPOINT_METADATA").unlink(),
        "never finished",
    ),
    "another version": (manifest(version=2), "version 2, expected 'orbax-params' version 1"),
    "another format": (manifest(format="x"), "'x'"),
    "no tensors": (manifest(tensors=[]), "tensors"),
    "a bad shape": (manifest(tensors={"embed": {"shape": [-1], "dtype": "float32"}}), "'embed' is"),
    "a bad dtype": (manifest(tensors={"embed": {"shape": [1], "dtype": ["x"]}}), "'embed' is"),
    "no entry": (manifest(tensors={"embed": 3}), "'embed' is"),
    "not JSON": (lambda store: (store / "checkpoint.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unfinished_or_malformed_store_is_refused(store, name):
    damage, problem = BROKEN[name]
    damage(store)
    with pytest.raises(CheckpointError, match=problem):
        orbax_store.stored(store)


def test_missing_data_is_a_typed_error(store):
    for file in (store / "params").rglob("*"):
        if file.is_file() and file.name != "_CHECKPOINT_METADATA":
            file.unlink()
    with pytest.raises(CheckpointError, match="cannot be restored"):
        orbax_store.restore(store, targets(first_device()))


@pytest.mark.parametrize("file", ["the largest of params", "params/_METADATA"])
def test_damaged_data_is_a_typed_error_in_one_line_and_no_log(store, file, caplog):
    """For both Orbax raises what is neither a ValueError nor an OSError."""
    found = [path for path in (store / "params").rglob("*") if path.is_file()]
    path = max(found, key=lambda path: path.stat().st_size) if file.startswith("the") else store / file
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be restored") as caught:
        orbax_store.restore(store, targets(first_device()))
    assert len(caught.value.problem) < 500 and "\n" not in caught.value.problem
    assert caplog.records == []


def test_a_machine_without_memory_is_not_the_folders_fault(store, monkeypatch):
    def restore(*_args, **_options):
        raise Exception("reading an array") from jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")  # as Orbax does

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", restore)
    with pytest.raises(Exception, match="reading an array") as caught:
        orbax_store.restore(store, targets(first_device()))
    assert not isinstance(caught.value, CheckpointError)


def test_an_array_that_orbax_does_not_know_is_a_typed_error(store):
    """It would leave the array out, and give back what was asked for instead."""
    path = store / "params" / "_METADATA"
    name = next(iter(orbax_store.stored(store)))
    last = name.rpartition("/")[2]
    text = path.read_text()
    assert f'"{last}"' in text
    path.write_text(text.replace(f'"{last}"', f'"{last}x"').replace(f"'{last}'", f"'{last}x'"))
    with pytest.raises(CheckpointError, match="cannot be restored"):
        orbax_store.restore(store, targets(first_device()))


def test_converting_copies_config_and_tokenizer_and_leaves_nothing_half(tmp_path, repository, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for file in (repository / "tests" / "data" / "parity" / "llama-tied").iterdir():
        (source / file.name).symlink_to(file) if file.suffix == ".npz" else (source / file.name).write_bytes(
            file.read_bytes()
        )
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "out" / "target", dtype=jnp.bfloat16)
    names = {path.name for path in (tmp_path / "out" / "target").iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "checkpoint.json", "params"}
    assert orbax_store.stored(tmp_path / "out" / "target")["embed"].dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "out" / "target")

    def fail(folder, params, **_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(orbax_store, "save", fail)
    with pytest.raises(RuntimeError):
        convert(source, tmp_path / "out" / "second")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["target"]
