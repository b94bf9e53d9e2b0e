"""Every implementation of the int8 matmul against exact integers and float64."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import Unsupported
from pallas_kernels.dispatch import Device
from pallas_kernels.int8_matmul import (
    Int8MatmulSpec,
    api,
    explain,
    gpu,
    int8_matmul,
    quantize_weight,
    reference,
    resolve,
    tpu,
)
from pallas_kernels.int8_matmul.cases import CASES, Int8MatmulCase, layer_of, make_inputs
from tests.pallas_kernels.interpreters import gpu_interpreter_without_races, tpu_interpreter_without_races

# An implementation and where it runs: as it is, or in an interpreter (on TPUs with either time of a copy).
WAYS = {
    "reference": ("reference", partial(nullcontext, False)),
    "xla": ("xla", partial(nullcontext, False)),
    "tpu": ("tpu", partial(tpu_interpreter_without_races, "on_wait")),
    "tpu_eager_copies": ("tpu", partial(tpu_interpreter_without_races, "eager")),
    "gpu": ("gpu", gpu_interpreter_without_races),
}

# Weight-only: largest error of a row relative to its largest component, or to the size that sums of the same products
# have with random signs. By the dtypes of x and of the result: bfloat16 results round by 2^-9 = 0.2 %; bfloat16 x may
# be held in 15 bits below its largest value (xla on a CPU); float32 sums of up to 4096 products stay near 1e-6.
TOLERANCE = {
    ("float32", "float32"): 1e-5,
    ("bfloat16", "float32"): 3e-4,
    ("bfloat16", "bfloat16"): 4e-3,
}


def run(case: Int8MatmulCase, quantize_activations: bool, way: str) -> np.ndarray:
    implementation, place = WAYS[way]
    context: AbstractContextManager[Any] = place()
    with context as interpret:
        call = partial(int8_matmul, quantize_activations=quantize_activations, out_dtype=case.out_dtype,
                       implementation=implementation, interpret=interpret)  # fmt: skip
        layer = layer_of(case)
        if implementation == "reference":
            return np.asarray(call(*make_inputs(case), layer=layer))
        arguments = [jnp.asarray(argument) for argument in make_inputs(case)]
        traced_layer = None if layer is None else jnp.asarray(layer)
        return np.asarray(jax.jit(lambda x, values, scale, layer: call(x, values, scale, layer=layer))
                          (*arguments, traced_layer))  # fmt: skip


def exact(case: Int8MatmulCase, quantize_activations: bool) -> tuple[np.ndarray, np.ndarray]:
    """[T, F] and the size of its components were signs random.

    Sums in float64; with quantised activations exact integers, then one float32 product after another, as the
    definition has it.
    """
    x, values, scale = make_inputs(case)
    layer = layer_of(case)
    values, scale = (values, scale) if layer is None else (values[layer], scale[layer])
    rows, weight = x.reshape(-1, case.in_features).astype(np.float64), values.astype(np.float64)
    scale = scale.reshape(-1)
    typical = np.abs(rows) @ np.abs(weight).T * scale / case.in_features**0.5 + 1e-30
    if not quantize_activations or not rows.size:
        return rows @ weight.T * scale, typical
    quantized, x_scale = reference.quantize_rows(rows)
    sums = quantized.astype(np.int64) @ values.astype(np.int64).T
    return sums.astype(np.float32) * x_scale * scale, typical


def assert_right(case: Int8MatmulCase, quantize_activations: bool, way: str, result: np.ndarray) -> None:
    wanted, typical = exact(case, quantize_activations)
    out_dtype = case.out_dtype or case.dtype
    assert result.shape == (*case.leading, case.out_features) and result.dtype == jnp.dtype(out_dtype)
    if quantize_activations and way != "reference":  # it multiplies the integers with float64 scales
        assert (result.reshape(wanted.shape) == wanted.astype(result.dtype)).all()
    result = result.astype(np.float64).reshape(wanted.shape)
    assert np.isfinite(result).all()
    if not quantize_activations:
        size = np.maximum(np.abs(wanted), typical).max(axis=1, initial=0)
        assert (np.abs(result - wanted).max(axis=1, initial=0) / size).max(initial=0) <= TOLERANCE[
            case.dtype, out_dtype
        ]
    assert (result[: case.zero_rows] == 0).all() and (result[:, 0] == 0).all()


def is_run(case: Int8MatmulCase, way: str) -> bool:
    """The second time of copies is for the cases with more than one block. The GPU interpreter has a report of races
    only when something ran.
    """
    if way == "gpu" and 0 in case.leading:
        return False
    return way != "tpu_eager_copies" or case.name.startswith("kernel_")


def is_served(case: Int8MatmulCase, quantize_activations: bool, way: str) -> bool:
    """The kernels multiply weights with bfloat16 only; quantised activations may come from float32 too. Hopper's copies
    have tiles.
    """
    if way == "gpu" and (case.in_features % 32 or case.out_features % 8):
        return False
    return way in ("reference", "xla") or quantize_activations or case.dtype == "bfloat16"


RUNS = [(case, way) for case in CASES for way in WAYS if is_run(case, way)]


@pytest.mark.parametrize("quantize_activations", [False, True], ids=["weight_only", "weights_and_activations"])
@pytest.mark.parametrize(("case", "way"), RUNS, ids=[f"{case.name}-{way}" for case, way in RUNS])
def test_case(case: Int8MatmulCase, quantize_activations: bool, way: str):
    if is_served(case, quantize_activations, way):
        assert_right(case, quantize_activations, way, run(case, quantize_activations, way))
    else:
        with pytest.raises(Unsupported, match=r"served are bfloat16 in this form|is not a multiple of"):
            run(case, quantize_activations, way)


@settings(max_examples=8)
@given(
    rows=st.integers(1, 40),
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 300),
    quantize_activations=st.booleans(),
    num_layers=st.none() | st.integers(1, 9),
)
def test_any_shape_on_tpus(rows, in_features, out_features, quantize_activations, num_layers):
    case = Int8MatmulCase("drawn", (rows,), in_features, out_features, "bfloat16", "float32", num_layers=num_layers)
    assert_right(case, quantize_activations, "tpu", run(case, quantize_activations, "tpu"))


@pytest.mark.parametrize("copies", ["on_wait", "eager"])
@pytest.mark.parametrize(("sum_rows", "sum_columns"), [(32, 128), (64, 384), (32, 0), (256, 256)])
def test_sums_that_are_made_part_by_part_on_tpus(sum_rows: int, sum_columns: int, copies: str):
    """Of rows and of D, some of which end in a smaller part; in either kind of block of features."""
    for case in (Int8MatmulCase("narrow", (90,), 700, 272, "bfloat16", "float32", zero_rows=3),
                 Int8MatmulCase("beside", (40,), 256, 1100, "bfloat16", "float32")):  # fmt: skip
        x, values, scale = make_inputs(case)
        blocks = tpu.Blocks(weight_bytes=256 * 1024, sum_rows=sum_rows, sum_columns=sum_columns)
        with tpu_interpreter_without_races(copies) as interpret:
            call = partial(tpu.tiled_matmul, blocks=blocks, quantize_activations=True, out_dtype=jnp.float32,
                           interpret=interpret)  # fmt: skip
            result = jax.jit(call)(x, values[None], scale.reshape(1, -1), jnp.zeros((1,), jnp.int32))
            assert_right(case, True, "tpu", np.asarray(result))


@settings(max_examples=8)
@given(
    rows=st.integers(1, 150),
    depth_tiles=st.integers(1, 9),
    feature_tiles=st.integers(1, 33),
    quantize_activations=st.booleans(),
    num_layers=st.none() | st.integers(1, 3),
    out_dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_shape_of_whole_tiles_on_gpus(
    rows, depth_tiles, feature_tiles, quantize_activations, num_layers, out_dtype
):
    case = Int8MatmulCase("drawn", (rows,), 32 * depth_tiles, 8 * feature_tiles, "bfloat16", out_dtype,
                          num_layers=num_layers)  # fmt: skip
    assert_right(case, quantize_activations, "gpu", run(case, quantize_activations, "gpu"))


@pytest.mark.parametrize("quantize_activations", [False, True], ids=["weight_only", "weights_and_activations"])
def test_a_gpu_program_walks_several_tiles_while_its_slots_wrap(quantize_activations: bool):
    """Two programs, six tiles of five copies each, three slots: copies of the next tile start before the last ended."""
    case = Int8MatmulCase("tiles", (72,), 160, 192, "bfloat16")
    x, values, scale = make_inputs(case)
    blocks = gpu.Blocks(rows=64, warpgroups=1, slots=3, programs=2)
    with gpu_interpreter_without_races() as interpret:
        call = partial(gpu.tiled_matmul, blocks=blocks, quantize_activations=quantize_activations,
                       out_dtype=jnp.bfloat16, interpret=interpret)  # fmt: skip
        result = jax.jit(call)(x, values[None], scale.reshape(1, -1), jnp.zeros((1,), jnp.int32))
        assert_right(case, quantize_activations, "gpu", np.asarray(result))


def test_quantised_activations_are_close_to_the_unquantised_product():
    """int8 activations keep about 7 bits: 2 % of a row's largest output for normal data."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(16, 512)).astype(np.float32), rng.normal(size=(64, 512)).astype(np.float32)
    values, scale = quantize_weight(jnp.asarray(weight))
    result = int8_matmul(jnp.asarray(x), values, scale, quantize_activations=True)
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.abs(result - wanted).max() / np.abs(wanted).max() < 0.02


def test_quantize_weight():
    weight = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    weight[2] = 0
    values, scale = (np.asarray(x) for x in quantize_weight(jnp.asarray(weight)))
    assert values.dtype == np.int8 and values.shape == (6, 40) and scale.dtype == np.float32 and scale.shape == (6, 1)
    assert (np.abs(values).max(axis=1) == [127, 127, 0, 127, 127, 127]).all()
    assert (np.abs(values * scale - weight) <= scale * 0.5001).all()


def test_wrong_arguments_are_refused():
    x, values, scale = (jnp.asarray(argument) for argument in make_inputs(CASES[0]))
    with pytest.raises(ValueError, match="do not fit together"):
        int8_matmul(x[:, 1:], values, scale, quantize_activations=False)
    with pytest.raises(ValueError, match="expected 3 axes with layer"):
        int8_matmul(x, values, scale, quantize_activations=False, layer=0)
    with pytest.raises(ValueError, match="expected int8"):
        int8_matmul(x, values.astype(jnp.int32), scale, quantize_activations=False)
    with pytest.raises(Unsupported, match="not floating point"):
        int8_matmul(x.astype(jnp.int32), values, scale, quantize_activations=False)
    with pytest.raises(ValueError, match="'triton' is not one of"):
        int8_matmul(x, values, scale, quantize_activations=False, implementation="triton")


def test_choice_and_suite():
    spec = Int8MatmulSpec(num_rows=8, in_features=64, out_features=48, quantize_activations=True)
    assert resolve(spec) == "xla" and resolve(spec, "reference") == "reference"
    chosen = [verdict.implementation for verdict in explain(spec) if verdict.chosen]
    assert chosen == ["xla"]
    assert {candidate.name for candidate in api.IMPLEMENTATIONS} == {name for name, _ in WAYS.values()}


@pytest.mark.parametrize(
    ("kind", "quantize_activations", "stacked", "wanted"),
    [
        ("TPU v6 lite", True, True, "tpu"),
        ("TPU v5 lite", True, True, "tpu"),
        ("TPU v6 lite", True, False, "xla"),
        ("TPU v6 lite", False, True, "xla"),
        ("TPU7x", True, True, "xla"),
        ("TPU v4", True, True, "xla"),
        ("NVIDIA H200", True, False, "gpu"),
        ("NVIDIA H200", False, False, "xla"),
        ("NVIDIA L40S", True, False, "xla"),
    ],
)
def test_default_by_device(kind: str, quantize_activations: bool, stacked: bool, wanted: str):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    spec = Int8MatmulSpec(8, 4096, 4096, quantize_activations, device=Device(platform, kind), stacked=stacked)
    assert resolve(spec) == wanted
    if wanted == "xla" and kind not in ("TPU v4", "NVIDIA L40S"):
        assert resolve(spec, platform) == platform, "a named implementation serves all the same"
        by_name = {verdict.implementation: verdict for verdict in explain(spec)}
        assert all(why.startswith("only by name here: ") for why in by_name[platform].reasons)
