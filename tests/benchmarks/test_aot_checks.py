"""The checks of `make aot` find what they are there for; the compilers themselves are not needed."""

import copy
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.aot import steps
from benchmarks.aot.cases import CASES, Case
from benchmarks.aot.checks import complaints, table

FOUND = {
    "plan": {"num_pages": 100, "bytes_per_page": 10, "weights": 4000},
    "layer_loop": "scanned",
    "attention": "tpu",
    "seconds": 300.0,
    "cpu_seconds": 100.0,  # on a busy machine: 50 s of two cores
    "tracing_seconds": 30.0,
    "programs": [
        {"name": "decode", "donates": True, "temporaries": 5, "aliased": 1001, "copies": [], "allowed": 9},
        {"name": "logits", "donates": False, "temporaries": 5, "aliased": 0, "copies": [], "allowed": 9},
    ],
    "decode": {"bytes": 1019, "ideal": 1000, "collectives": {"all-reduce": 65, "all-gather": 1}},
}
NO_ROOM = {"error": "512 pages need more", "weights": 9 * 10**9, "budget": 8 * 10**9}
FOUR, ONE = Case("8b", "v5e:4"), Case("8b", "v6e:1")


def test_a_good_result_passes_and_stands_in_the_table():
    assert complaints(FOUR, FOUND) == []
    line = table([(FOUR, FOUND)]).splitlines()[-1]
    assert line.startswith("| 8b-bf16-v5e:4 | scanned | tpu | 100 | 2 | 50 |") and "| 1.019 | 2 |" in line


def changed(*path_and_value):
    *path, last, value = path_and_value
    result = copy.deepcopy(FOUND)
    node = result
    for key in path:
        node = node[key]
    node[last] = value
    return result


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (changed("programs", 0, "aliased", 999), "decode: 999 B lie in donated arguments"),
        (changed("programs", 1, "copies", ["copy.7"]), "logits: copies whole weights or pages: copy.7"),
        (changed("programs", 1, "temporaries", 10), "logits: temporaries of 10 B, over 9 B"),
        (changed("decode", "bytes", 1101), "moves 1.101 times the least bytes"),
        (changed("decode", "collectives", {"all-reduce": 97, "all-gather": 1}), "3.0 collectives a layer"),
        (changed("cpu_seconds", 260.0), "compiled in 130 s"),
        (NO_ROOM, "does not fit: 512 pages"),
        ({"failure": "JaxRuntimeError: vmem"}, "did not compile: JaxRuntimeError: vmem"),
    ],
)
def test_a_bad_result_is_named(result, words):
    (found,) = complaints(FOUR, result)
    assert words in found
    assert table([(FOUR, result)]).count("\n") == 2


def test_one_device_has_no_collectives_and_xlas_attention_no_ratio():
    assert complaints(ONE, changed("decode", "collectives", {})) == []
    assert complaints(ONE, FOUND) == ["66.0 collectives a layer"]
    assert complaints(FOUR, changed("decode", "bytes", None)) == []


def test_where_memory_is_missing_only_the_error_passes():
    small = Case("70b", "h200:1", fits=False)
    assert complaints(small, NO_ROOM) == []
    assert complaints(small, FOUND) == ["fits, where a memory error was expected"]
    assert "memory error: weights of 9.000 GB, budget 8.000 GB" in table([(small, NO_ROOM)])


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_residual_stream_may_have_the_size_of_a_weight_but_never_its_dimensions():
    """An 8B model's keys' weight, and 1,024 tokens; a weight that has those very dimensions stays guarded."""
    sharding = SingleDeviceSharding(jax.devices()[0])

    def signature(*weight: int) -> Any:
        params = {"k": jax.ShapeDtypeStruct(weight, jnp.bfloat16, sharding=sharding)}
        return SimpleNamespace(params=params, model=SimpleNamespace(config=SimpleNamespace(hidden_size=4096)))

    assert steps.stream_of(signature(2, 4096, 1024), ("prefill", 1024)) == (1024, 4096)
    assert steps.stream_of(signature(2, 1024, 4096), ("prefill", 1024)) is None
    assert steps.stream_of(signature(2, 4096, 1024), ("decode", 64)) is None
