"""Lazy tensors compose like arrays, and place like them."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints import CheckpointError, tensors
from checkpoints.families import FAMILIES
from checkpoints.placement import place
from checkpoints.rules import Family, Origin, Part, Rule, map_tensors, origin

ARRAY = np.arange(48, dtype=np.float32).reshape(6, 8)
CASES = {
    "plain": (lambda lazy: lazy, ARRAY),
    "transposed": (tensors.transposed, ARRAY.T),
    "cast": (lambda lazy: tensors.cast(lazy, np.float16), ARRAY.astype(np.float16)),
    "cut": (lambda lazy: tensors.cut(lazy, 0, 2, 5), ARRAY[2:5]),
    "padded": (lambda lazy: tensors.padded(lazy, 1, 11), np.pad(ARRAY, ((0, 0), (0, 3)))),
    "repeated": (
        lambda lazy: tensors.repeated(lazy, 1, 4, 3),
        np.tile(ARRAY.reshape(6, 2, 1, 4), (3, 1)).reshape(6, 24),
    ),
    "cut and transposed": (lambda lazy: tensors.transposed(tensors.cut(lazy, 0, 2, 5)), ARRAY[2:5].T),
    "repeated after transposed": (
        lambda lazy: tensors.repeated(tensors.transposed(lazy), 1, 3, 2),
        np.repeat(ARRAY.T.reshape(8, 2, 1, 3), 2, axis=2).reshape(8, 12),
    ),
}


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_any_box_equals_the_arrays_own(name, data):
    make, expected = CASES[name]
    lazy = make(tensors.from_array("x", ARRAY))
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    box = []
    for size in expected.shape:
        start = data.draw(st.integers(0, size))
        box.append(slice(start, data.draw(st.integers(start, size))))
    np.testing.assert_array_equal(lazy[tuple(box)], expected[tuple(box)])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("axes", [(), ("x",), (None, "x")])
def test_a_tensor_is_placed_on_its_shards(name, axes):
    make, expected = CASES[name]
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    if any(axis and size % 2 for axis, size in zip(axes, expected.shape, strict=False)):
        pytest.skip("does not divide")
    placed = place(make(tensors.from_array("x", ARRAY)), sharding)
    assert placed.sharding == sharding and placed.dtype == expected.dtype
    np.testing.assert_array_equal(placed, expected)


def test_only_the_parts_that_devices_need_are_read_and_each_once():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    read = []

    def spy(box):
        read.append(box)
        return ARRAY[box]

    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    lazy = tensors.LazyTensor("x", ARRAY.shape, ARRAY.dtype, spy)
    np.testing.assert_array_equal(place(lazy, NamedSharding(mesh, PartitionSpec("x"))), ARRAY)
    assert [[(part.start, part.stop) for part in box] for box in read] == [[(0, 3), (0, 8)], [(3, 6), (0, 8)]]


def test_a_placed_tensor_does_not_change_with_its_file(tmp_path):
    mapped = np.memmap(tmp_path / "data", ml_dtypes.bfloat16, "w+", shape=(64, 64))
    mapped[:] = 1
    placed = place(tensors.from_array("x", mapped), SingleDeviceSharding(jax.devices()[0]))
    mapped[:] = 2
    assert (np.asarray(placed) == 1).all()


CONFIG = {"tie_word_embeddings": False, "num_heads": 4, "num_kv_heads": 1, "head_dim": 1}
FUSED = Family(
    "fused",
    ("FusedForCausalLM",),
    (
        Rule(
            "layers.{layer}.qkv.weight",
            transpose=True,
            parts=(
                Part("layers/{layer}/q/weight", ("num_heads", "head_dim")),
                Part("layers/{layer}/k/weight", ("num_kv_heads", "head_dim")),
                Part("layers/{layer}/v/weight", ("num_kv_heads", "head_dim")),
            ),
        ),
    ),
)


def test_a_fused_tensor_is_cut_by_the_familys_table():
    tree = map_tensors({"layers.3.qkv.weight": tensors.from_array("qkv", ARRAY)}, FUSED, CONFIG, "model")
    assert {path: tensor.shape for path, tensor in tree.items()} == {
        "layers/3/q/weight": (8, 4), "layers/3/k/weight": (8, 1), "layers/3/v/weight": (8, 1),
    }  # fmt: skip
    np.testing.assert_array_equal(tree["layers/3/v/weight"][...], ARRAY[5:6].T)
    with pytest.raises(CheckpointError, match="expected 9 rows"):
        map_tensors(
            {"layers.3.qkv.weight": tensors.from_array("qkv", ARRAY)}, FUSED, {**CONFIG, "num_heads": 7}, "model"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_origin_of_a_path_is_what_map_tensors_made_it_from(family):
    rules = FAMILIES[family].rules
    found = {rule.pattern.format(layer=12): ARRAY if rule.transpose else ARRAY[0] for rule in rules}
    lazy = {name: tensors.from_array(name, array) for name, array in found.items()}
    tree = map_tensors(lazy, FAMILIES[family], CONFIG, "model")
    assert len(tree) == len(rules)
    for path, tensor in tree.items():
        there = origin(path, FAMILIES[family])
        assert (there.name, there.shape(tensor.shape)) == (tensor.name, found[tensor.name].shape)


def test_the_origin_of_a_part_and_of_an_unknown_path():
    assert origin("layers/3/k/weight", FUSED) == Origin("layers.3.qkv.weight", transposed=True, is_part=True)
    assert origin("layers/3/w/weight", FUSED) == Origin("layers/3/w/weight")


def test_names_that_no_rule_knows_are_reported():
    extra = {f"model.layers.0.mlp.experts.{i}.w1.weight": tensors.from_array("x", ARRAY) for i in range(7)}
    with pytest.raises(CheckpointError, match=r"7 tensors unknown to llama.*experts.0.*and 2 more"):
        map_tensors(extra, FAMILIES["llama"], CONFIG, "model")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": tensors.from_array("x", ARRAY)}
    assert map_tensors(old, FAMILIES["llama"], CONFIG, "model") == {}


def test_a_second_copy_of_a_tied_head_is_dropped():
    head = {"lm_head.weight": tensors.from_array("head", ARRAY)}
    assert map_tensors(head, FAMILIES["llama"], CONFIG, "model")["head"].shape == (8, 6)
    assert map_tensors(head, FAMILIES["llama"], {**CONFIG, "tie_word_embeddings": True}, "model") == {}


def test_a_matrix_of_another_rank_is_refused():
    with pytest.raises(CheckpointError, match="expected a matrix"):
        map_tensors({"lm_head.weight": tensors.from_array("head", ARRAY[0])}, FAMILIES["llama"], CONFIG, "model")
