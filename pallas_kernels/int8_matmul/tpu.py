"""The int8 matmul as a Mosaic TPU kernel.

The grid walks blocks of output features; a block of weights is all of D wide, so that a product is one sum, never
carried from step to step. The rows of x stay in VMEM, and where activations are quantised they are so once, at the
first block of features, into a scratch that all others reuse. Weights stream through the pipeline's two buffers.
Sums of some rows at a time stay in registers, or, where D is wide, go to VMEM and back for each part of it.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.devices import INT8_MATRIX_UNIT, TWO_CORES, tpu_reasons
from pallas_kernels.dispatch import current_device
from pallas_kernels.int8_matmul.contract import (
    SMALLEST_MAXIMUM,
    Int8MatmulImplementation,
    Int8MatmulSpec,
    common_reasons,
)

LAST_WITH_LAST = (((1,), (1,)), ((), ()))
LANES = 128
# int8 tiles are 32 rows high.
QUANTIZED_ROWS, QUANTIZED_COLUMNS = 32, 1024
# Products of so many features take longer than quantising the rows, which then costs little beside them: 512 rows of
# 4096 on a v6e 5,450 bundles, one after the other 2,500 + 4,250. It is twice the code and compiles as much longer; with
# blocks of 512 features of a v5e it would save less than 1 %.
OVERLAPPED_FEATURES = 1024
# Parts of D up to which all groups of rows are one stretch of code. 256 of 512 rows at a time, on a v6e: D 4096, 8
# parts, 18,773 bundles (as a loop, which fills and drains the matrix unit for either group, 21,085); D 14336, 28 parts,
# 68,573, and spills in 48 % of the loop's (as a loop of groups 69,781 and 0.1 %).
UNROLLED_PARTS = 8
# Of the smallest VMEM of the served chips (64 MiB, TPU7x); what is left is the compiler's own for sums and spills.
BLOCKS_BYTES = 40 * 2**20
VMEM_BYTES = 56 * 2**20


@dataclass(frozen=True)
class Blocks:
    """rows: most rows of x a block. weight_bytes: of a block of weights; it is at least 128 output features. sum_rows:
    rows whose sums are made at a time; sum_columns: of D at a time, 0 for all. Both where activations are quantised.
    """

    rows: int = 512
    weight_bytes: int = 2**19
    sum_rows: int = 256
    sum_columns: int = 0


@dataclass(frozen=True)
class Tiling:
    """What a call uses: rows and output features a block, cores that share the features; of a block, rows and columns
    of D that are summed at a time.
    """

    rows: int
    out_features: int
    cores: int
    sum_rows: int
    sum_columns: int

    def loops(self, width: int) -> bool:
        """Whether groups of rows are passes of a loop and not one stretch of code."""
        return pl.cdiv(width, self.sum_columns) > UNROLLED_PARTS


def matmul(
    x: Array, values: Array, scale: Array, layer: Array, *, quantize_activations: bool, out_dtype: Any, interpret: Any
) -> Array:
    """See `contract.Int8MatmulImplementation`."""
    form = "weights and activations" if quantize_activations else "weights"
    blocks = tuning.lookup("int8_matmul", current_device().kind, form=form, rows=x.shape[0], in_features=x.shape[1])
    return tiled_matmul(x, values, scale, layer, Blocks(**blocks or {}), quantize_activations, out_dtype, interpret)


def tiled_matmul(
    x: Array, values: Array, scale: Array, layer: Array, blocks: Blocks, quantize_activations: bool, out_dtype: Any,
    interpret: Any,
) -> Array:  # fmt: skip
    """As `matmul`, with given blocks."""
    (num_rows, in_features), (num_layers, out_features, _) = x.shape, values.shape
    width = round_up(in_features, LANES)
    # Zeros meet whatever the weight block holds behind its last feature: integers, so that the products are zero.
    x = jnp.pad(x, ((0, 0), (0, width - in_features))) if width > in_features else x
    tiling = choose_tiling(num_rows, width, out_features, x.dtype.itemsize, blocks)
    num_row_blocks, num_blocks = pl.cdiv(num_rows, tiling.rows), pl.cdiv(out_features, tiling.out_features)
    blocks_a_core = num_blocks // tiling.cores

    def feature_block(core, j):
        return core * blocks_a_core + j

    def index(layer):
        # Proves what the compiled kernel does not check again.
        return jnp.clip(layer[0], 0, num_layers - 1)

    kernel = functools.partial(quantized_kernel, tiling) if quantize_activations else weight_only_kernel
    # A scale's layer is found in a tile of 8 layers: a block of one row would need another tiling, a copy of them all.
    scale_layers = min(num_layers, 8)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, out_features), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiling.cores, num_row_blocks, blocks_a_core),
            in_specs=[
                pl.BlockSpec(
                    (tiling.rows, width),
                    lambda core, i, j, layer: (i, 0),
                    pipeline_mode=pl.Buffered(1 if num_row_blocks == 1 else 2),
                ),
                pl.BlockSpec(
                    (None, tiling.out_features, width),
                    lambda core, i, j, layer: (index(layer), feature_block(core, j), 0),
                ),
                pl.BlockSpec(
                    (scale_layers, tiling.out_features),
                    lambda core, i, j, layer: (index(layer) >> 3, feature_block(core, j)),
                ),
            ],
            out_specs=pl.BlockSpec(
                (tiling.rows, tiling.out_features), lambda core, i, j, layer: (i, feature_block(core, j))
            ),
            scratch_shapes=scratch_shapes(tiling, width) if quantize_activations else [],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="int8_matmul" if quantize_activations else "int8_weight_matmul",
    )(layer, x, values, scale)


def scratch_shapes(tiling: Tiling, width: int) -> list:
    """Quantised rows, their scales, what they are multiplied by in all lanes, and sums that are not finished."""
    sums = tiling.out_features if tiling.sum_columns < width else LANES
    columns = ((width, jnp.int8), (1, jnp.float32), (LANES, jnp.float32), (sums, jnp.int32))
    return [pltpu.VMEM((tiling.rows, number), dtype) for number, dtype in columns]


def weight_only_kernel(layer_ref, x_ref, values_ref, scale_ref, out_ref):
    sums = lax.dot_general(x_ref[...], values_ref[...].astype(x_ref.dtype), LAST_WITH_LAST,
                           preferred_element_type=jnp.float32)  # fmt: skip
    out_ref[...] = (sums * scale_of_layer(layer_ref, scale_ref)).astype(out_ref.dtype)


def quantized_kernel(
    tiling: Tiling, layer_ref, x_ref, values_ref, scale_ref, out_ref, quantized_ref, x_scale_ref, factor_ref, sums_ref
):
    def multiply_some(rows) -> None:
        sums = summed(quantized_ref, values_ref, sums_ref, rows, tiling.sum_columns)
        scaled = sums.astype(jnp.float32) * x_scale_ref[rows, :] * scale_of_layer(layer_ref, scale_ref)
        out_ref[rows, :] = scaled.astype(out_ref.dtype)

    def multiply() -> None:
        size, in_loop = tiling.sum_rows, tiling.rows if tiling.loops(quantized_ref.shape[1]) else 0
        pl.loop(0, in_loop // size)(lambda i: multiply_some(pl.ds(pl.multiple_of(i * size, size), size)))
        for start in range(in_loop // size * size, tiling.rows, size):
            multiply_some(pl.ds(start, min(size, tiling.rows - start)))

    is_first, beside = pl.program_id(2) == 0, values_ref.shape[0] >= OVERLAPPED_FEATURES

    @pl.when(is_first)
    def _():
        find_scales(x_ref, x_scale_ref, factor_ref)
        quantize(x_ref, factor_ref, quantized_ref, beside)
        if beside:
            multiply()

    pl.when(~is_first if beside else True)(multiply)


def summed(quantized_ref, values_ref, sums_ref, rows, sum_columns: int) -> Array:
    """i32[rows, F block]. Parts of D but the last leave their sums in `sums_ref`: those of 256 rows and one pass of a
    v6e's matrix unit would fill all 64 registers.
    """
    width = quantized_ref.shape[1]
    for start in range(0, width, sum_columns):
        columns = pl.ds(start, min(sum_columns, width - start))
        sums = lax.dot_general(quantized_ref[rows, columns], values_ref[:, columns], LAST_WITH_LAST,
                               preferred_element_type=jnp.int32)  # fmt: skip
        sums = sums + sums_ref[rows, :] if start else sums
        if start + sum_columns >= width:
            return sums
        sums_ref[rows, :] = sums
    raise ValueError("x has no columns")


def find_scales(x_ref, x_scale_ref, factor_ref) -> None:
    """Scales of all rows, f32[rows, 1], and what the rows are multiplied by, in all lanes."""
    num_rows, width = x_ref.shape
    group = next(rows for rows in (256, 128, 64, QUANTIZED_ROWS, num_rows) if num_rows % rows == 0)
    # Largest bfloat16 are exact in bfloat16, and so are two tiles of them in one register.
    step = 2 * LANES if x_ref.dtype == jnp.bfloat16 and width % (2 * LANES) == 0 else LANES

    @pl.loop(0, num_rows // group)
    def _(i):
        rows = pl.ds(pl.multiple_of(i * group, group), group)
        largest = jnp.zeros((group, step), x_ref.dtype)
        for start in range(0, width, step):
            largest = jnp.maximum(largest, jnp.abs(x_ref[rows, start : start + step]))
        maximum = jnp.maximum(largest.astype(jnp.float32).max(axis=1, keepdims=True), SMALLEST_MAXIMUM)
        x_scale_ref[rows, :] = maximum * (1 / 127)
        factor_ref[rows, :] = jnp.broadcast_to(127 / maximum, (group, LANES))


def quantize(x_ref, factor_ref, quantized_ref, beside: bool) -> None:
    """beside: in one stretch of code with the product that follows, so that the compiler orders both together."""

    num_rows, width = x_ref.shape

    def part(rows, columns, num_columns: int) -> None:
        factor = jnp.concatenate([factor_ref[rows, :]] * (num_columns // LANES), axis=1)
        quotients = x_ref[rows, columns].astype(jnp.float32) * factor
        # By way of int32 the compiler rounds in one addition; straight to int8 it would saturate first.
        quantized_ref[rows, columns] = jnp.rint(quotients).astype(jnp.int32).astype(jnp.int8)

    def each(size: int, total: int):
        return lambda body: pl.loop(0, total // size)(lambda i: body(pl.ds(pl.multiple_of(i * size, size), size)))

    if beside:
        part(slice(None), slice(None), width)
    elif num_rows > QUANTIZED_ROWS:
        each(QUANTIZED_ROWS, num_rows)(lambda rows: part(rows, slice(None), width))
    else:
        # One group of rows is no loop: whole rows would be one stretch of code with the product, and 32 of them spill.
        size = math.gcd(width, QUANTIZED_COLUMNS)
        each(size, width)(lambda columns: part(slice(None), columns, size))


def scale_of_layer(layer_ref, scale_ref) -> Array:
    """f32[1, F block] of the layer, out of the tile of layers that holds it."""
    return scale_ref[pl.ds(layer_ref[0] & 7, 1), :]


def choose_tiling(num_rows: int, width: int, out_features: int, itemsize: int, blocks: Blocks) -> Tiling:
    """Blocks that fit VMEM. Rows are spread evenly over as few blocks as `blocks.rows` allows: a block that is mostly
    padding costs as much as a full one, and each reads all weights.
    """
    features = min(max(LANES, blocks.weight_bytes // width // LANES * LANES), round_up(out_features, LANES))
    most = min(blocks.rows, num_rows)
    while most > 8 and vmem_bytes(most, features, width, itemsize, most < num_rows) > BLOCKS_BYTES:
        most //= 2
    rows = pl.cdiv(num_rows, pl.cdiv(num_rows, most))
    rows = round_up(rows, QUANTIZED_ROWS) if rows > 16 else round_up(rows, 8)
    cores = 2 if current_device().kind in TWO_CORES and pl.cdiv(out_features, features) % 2 == 0 else 1
    return Tiling(rows, features, cores, min(blocks.sum_rows, rows), min(blocks.sum_columns or width, width))


def vmem_bytes(rows: int, features: int, width: int, itemsize: int, more_rows: bool) -> int:
    """Buffers of x (one, or two when more rows follow), two of weights and of a float32 result, the quantised x, one
    block of sums.
    """
    x_bytes = (2 if more_rows else 1) * itemsize + 1
    return rows * width * x_bytes + 2 * features * width + rows * features * 12


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def unsupported_reasons(spec: Int8MatmulSpec) -> list[str]:
    reasons = common_reasons(spec) + tpu_reasons(spec.device, spec.interpret)
    served = ("bfloat16", "float32") if spec.quantize_activations else ("bfloat16",)
    if jnp.dtype(spec.dtype).name not in served:
        reasons.append(f"x has dtype {jnp.dtype(spec.dtype).name}, served are {' and '.join(served)} in this form")
    needed = vmem_bytes(8, LANES, round_up(spec.in_features, LANES), jnp.dtype(spec.dtype).itemsize, True)
    if needed > BLOCKS_BYTES:
        reasons.append(f"blocks of 8 rows and {LANES} features of D {spec.in_features} are {needed} bytes, "
                       f"more than {BLOCKS_BYTES} of VMEM")  # fmt: skip
    return reasons


def yielding_reasons(spec: Int8MatmulSpec) -> list[str]:
    reasons = []
    if not spec.quantize_activations:
        reasons.append("XLA fuses the conversion of the weights into its own matmul")
    if spec.device.kind not in INT8_MATRIX_UNIT:
        reasons.append(f"the matrix unit of {spec.device.kind} multiplies no int8")
    if not spec.stacked:
        reasons.append("a slice of scanned weights would be copied: pass the stack and `layer`")
    return reasons


IMPLEMENTATION = Int8MatmulImplementation("tpu", True, unsupported_reasons, matmul, yielding_reasons)
