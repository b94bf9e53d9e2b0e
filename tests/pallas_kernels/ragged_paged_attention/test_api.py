"""Choosing, refusing, schedules, dense views and sharding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import Unsupported
from pallas_kernels.ragged_paged_attention import (
    AttentionSpec,
    dense_to_pages,
    explain,
    kv_head_axis,
    kv_pages_shape,
    make_schedule,
    pages_to_dense,
    ragged_paged_attention,
    resolve,
)
from pallas_kernels.ragged_paged_attention.cases import CASES, make_inputs
from tests.pallas_kernels.ragged_paged_attention.support import assert_right, options_of

IMPLEMENTATIONS = ("reference", "xla")
SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=8)
BY_NAME = {case.name: case for case in CASES}


def test_the_default_is_xla_and_the_reference_only_by_name():
    assert resolve(SPEC) == "xla"
    assert resolve(SPEC, "reference") == "reference"
    tpu, gpu, *others = explain(SPEC)
    assert tpu.implementation == "tpu" and tpu.reasons[0] == "runs on TPUs, this is cpu"
    assert gpu.implementation == "gpu" and gpu.reasons[0] == "runs on Hopper GPUs (sm_90a), this is cpu"
    assert [(v.implementation, v.chosen, v.reasons) for v in others] == [
        ("xla", True, ()),
        ("reference", False, ("only by name",)),
    ]


def test_a_refusal_lists_every_reason():
    spec = replace(SPEC, num_kv_heads=3, dtype=jnp.int32, kv_dtype=jnp.int8)
    with pytest.raises(Unsupported) as refusal:
        resolve(spec)
    assert len(refusal.value.reasons["xla"]) == 3
    for part in ("not a multiple", "int32", "need k_scale"):
        assert part in str(refusal.value)


def test_an_unknown_name_is_no_fallback():
    with pytest.raises(ValueError, match="'triton' is not one of"):
        resolve(SPEC, "triton")
    with pytest.raises(ValueError, match="'triton' is not one of"):
        kv_head_axis("triton")


def test_pages_of_another_layout_and_wrong_shapes_are_refused():
    inputs = make_inputs(BY_NAME["decode"])
    arguments = list(inputs.arguments())
    arguments[3] = inputs.kv_pages[:, :, 0]
    with pytest.raises(Unsupported, match="layout"):
        ragged_paged_attention(*arguments, scale=1.0)
    arguments = list(inputs.arguments())
    arguments[7] = inputs.cu_q_lens[:-1]
    with pytest.raises(ValueError, match="cu_q_lens has shape"):
        ragged_paged_attention(*arguments, scale=1.0)


@pytest.mark.parametrize("name", ["decode_padded", "mixed_everything"])
def test_a_schedule_made_outside_gives_the_same_bytes(name: str):
    case = BY_NAME[name]
    inputs = make_inputs(case)
    schedule = jax.jit(lambda *rows: make_schedule(
        *rows, num_tokens=case.num_tokens, page_size=case.page_size, num_q_heads=case.num_kv_heads * case.group,
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, dtype=case.dtype, kv_dtype=case.kv_dtype,
        max_q_len=case.max_q_len,
    ))(inputs.kv_lens, inputs.page_indices, inputs.cu_q_lens, inputs.distribution)  # fmt: skip
    arguments = [jnp.asarray(argument) for argument in inputs.arguments()]
    options = options_of(case, inputs)
    outputs, pages = jax.jit(lambda *a, **k: ragged_paged_attention(*a, **k, **options))(*arguments, schedule=schedule)
    assert_right(case, inputs, np.asarray(outputs), np.asarray(pages))


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "tpu"))
def test_dense_and_pages_are_inverse(implementation: str):
    shape = kv_pages_shape(2, 6, 4, 3, 16, jnp.bfloat16, implementation=implementation)
    assert shape[:2] == (2, 6) and shape[kv_head_axis(implementation)] == 3
    pages = jnp.full(shape, jnp.nan, jnp.bfloat16)
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(10, 3, 16)), jnp.bfloat16) for _ in range(2))
    row = jnp.array([4, 0, 3, -1, 99])
    written = dense_to_pages(pages, 1, row, keys, values, implementation=implementation)
    assert np.isnan(np.asarray(written, np.float32)[0]).all(), "the other layer is untouched"
    assert np.isnan(np.asarray(written, np.float32)).sum() == np.prod(shape) - 2 * keys.size
    k, v = pages_to_dense(written, 1, row, 10, implementation=implementation)
    assert np.array_equal(k, keys) and np.array_equal(v, values)


def test_pages_to_dense_of_a_traced_length_is_padded_with_zeros():
    pages = jnp.full(kv_pages_shape(1, 4, 4, 1, 16, jnp.float32), jnp.nan)
    keys = jnp.ones((6, 1, 16))
    pages = dense_to_pages(pages, 0, jnp.array([2, 1]), keys, keys, implementation="xla")
    k, _ = jax.jit(lambda n: pages_to_dense(pages, 0, jnp.array([2, 1, -5]), n, implementation="xla"))(6)
    assert k.shape == (12, 1, 16)
    assert np.array_equal(k, np.pad(np.ones((6, 1, 16)), ((0, 6), (0, 0), (0, 0))))


@pytest.mark.parametrize("name", ["decode_sinks", "mixed_window"])
def test_heads_sharded_over_a_mesh(name: str):
    """On two devices where there are two, else on one: the call must not care."""
    case = BY_NAME[name]
    inputs = make_inputs(case)
    devices = jax.devices()[: min(2, len(jax.devices()))]
    mesh = jax.sharding.Mesh(np.array(devices), ("tensor",))
    heads, everywhere = PartitionSpec(None, "tensor"), PartitionSpec()
    axis = kv_head_axis("xla")
    pages_spec = PartitionSpec(*[None] * axis, "tensor")
    options = options_of(case, inputs)
    sinks = options.pop("sinks")
    sinks_spec = everywhere if sinks is None else PartitionSpec("tensor")

    def attend(sinks, *arguments):
        return ragged_paged_attention(*arguments, sinks=sinks, **options)

    in_specs = (sinks_spec, heads, heads, heads, pages_spec, *[everywhere] * 5)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=(heads, pages_spec))
    outputs, pages = jax.jit(sharded)(sinks, *(jnp.asarray(argument) for argument in inputs.arguments()))
    assert_right(case, inputs, np.asarray(outputs), np.asarray(pages))


def test_rows_and_heads_sharded_over_a_mesh():
    """Two groups of rows with pages of their own, and heads over a second axis: lengths differ between devices too."""
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    case = BY_NAME["mixed_window"]
    both = [make_inputs(case, seed) for seed in (1, 2)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    axis = kv_head_axis("xla")
    tokens, rows = PartitionSpec("data", "tensor"), PartitionSpec("data")
    pages_spec = PartitionSpec(None, "data", *[None] * (axis - 2), "tensor")
    options = options_of(case, both[0])

    def attend(*arguments):
        return ragged_paged_attention(*arguments, **options)

    in_specs = (tokens, tokens, tokens, pages_spec, PartitionSpec(), *[rows] * 4)
    pairs = list(zip(*(inputs.arguments() for inputs in both), strict=True))
    joined = [pair[0] if i == 4 else np.concatenate(pair, axis=1 if i == 3 else 0) for i, pair in enumerate(pairs)]
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=(tokens, pages_spec))
    outputs, pages = (np.asarray(x) for x in jax.jit(sharded)(*(jnp.asarray(x) for x in joined)))
    for inputs, out, own_pages in zip(both, np.split(outputs, 2), np.split(pages, 2, axis=1), strict=True):
        assert_right(case, inputs, out, np.ascontiguousarray(own_pages))
