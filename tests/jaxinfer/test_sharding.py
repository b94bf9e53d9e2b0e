"""The table from logical to mesh axes, and what a model becomes on a mesh."""

import jax
import pytest
from jax.sharding import PartitionSpec
from paged_model import tiny_config

from jaxinfer import sharding
from jaxinfer.errors import InvalidConfig


def test_a_mesh_has_all_axes_and_the_asked_size():
    mesh = sharding.make_mesh(1)
    assert dict(mesh.shape) == {"data": 1, "tensor": 1, "expert": 1}
    assert sharding.tensor_parallel_size(mesh) == sharding.tensor_parallel_size(None) == 1


@pytest.mark.parametrize("size", [0, 1000])
def test_a_mesh_larger_than_the_machine_is_refused(size):
    with pytest.raises(InvalidConfig, match=f"1 to {len(jax.devices())}.*got {size}"):
        sharding.make_mesh(size)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shards", "expected"),
    [
        (8, 2, 1, (2, 1)),
        (8, 2, 2, (2, 1)),
        (8, 2, 4, (4, 2)),
        (8, 2, 8, (8, 4)),
        (12, 6, 4, (12, 2)),
        (8, 8, 4, (8, 1)),
    ],
)
def test_kv_heads_are_repeated_until_every_shard_has_whole_ones(heads, kv_heads, shards, expected):
    config = tiny_config(num_heads=heads, num_kv_heads=kv_heads)
    sizes = sharding.sharded_sizes(config, shards)
    assert (sizes.num_kv_heads, sizes.kv_repeats) == expected


@pytest.mark.parametrize(("vocab", "shards", "padded"), [(250, 1, 250), (250, 2, 250), (250, 4, 252), (250, 8, 256)])
def test_the_vocabulary_is_padded_to_whole_shards(vocab, shards, padded):
    assert sharding.sharded_sizes(tiny_config(vocab_size=vocab), shards).vocab_size == padded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 2}, "4 does not divide the model's 6 query heads"),
        ({"intermediate_size": 130}, "4 does not divide the model's 130 feed-forward width"),
    ],
)
def test_what_does_not_divide_is_refused_with_both_numbers(changes, message):
    with pytest.raises(InvalidConfig, match=message):
        sharding.sharded_sizes(tiny_config(**changes), 4)


def test_axes_become_a_partition_spec():
    assert sharding.partition_spec(("layers", "model", "heads")) == PartitionSpec(None, None, "tensor")
    assert sharding.partition_spec(("vocab", "model")) == PartitionSpec("tensor", None)
    assert sharding.partition_spec((None, "experts")) == PartitionSpec(None, "expert")
