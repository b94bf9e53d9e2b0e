"""The int8 matmul as a Mosaic GPU kernel for Hopper.

Operands are swapped: weights are the 64-row side of a warpgroup's matrix instruction, rows of x the other one, which
may be as narrow as 8. One warpgroup only starts copies (TMA), the others multiply. Programs are persistent: each walks
its share of the tiles, and the copies of the next tile run while the last one is stored.

Activations are quantised by a kernel of their own before it, a row a program. Inside the matmul every tile of features
would do it again: x is 2 bytes an element and read twice, so with 64 rows and D = F = 4096 that is 64 tiles times 1 MB
from L2, for 17 MB of weights.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.devices import hopper_reasons
from pallas_kernels.dispatch import current_device
from pallas_kernels.int8_matmul.contract import (
    SMALLEST_MAXIMUM,
    Int8MatmulImplementation,
    Int8MatmulSpec,
    common_reasons,
)
from pallas_kernels.int8_matmul.xla import quantize_rows

# Rows of one matrix instruction (wgmma, PTX ISA), and of a swizzled tile in shared memory.
INSTRUCTION_ROWS, TILE_ROWS = 64, 8
# Bytes of a row of a swizzled tile; the widest spreads best over the banks.
SWIZZLES = (128, 64, 32)
# Most rows of x that leave by one copy, a [64, 64] part of the sums; and what a wider tile's rows are a multiple of.
STORED_ROWS, WIDE_ROWS = 64, 32
# Elements of a row that a warpgroup (128 threads, up to 8 elements a load) holds at once.
QUANTIZED_PARTS = (4096, 2048, 1024, 512, 256, 128)
# Shared memory a block of Hopper may have, less what barriers and alignment take.
SHARED_BYTES = 232_448 - 4_096
# Registers a thread when a whole multiprocessor's 65,536 go to two multiplying warpgroups and one that copies.
MULTIPLYING_REGISTERS, COPYING_REGISTERS = 232, 40


@dataclass(frozen=True)
class Blocks:
    """Of one program.

    Fields:
      rows: most rows of x, a multiple of 64, at most 256 (wgmma).
      warpgroups: that multiply, each 64 output features.
      slots: most copies in flight; fewer where shared memory is full.
      programs: that run at once; the multiprocessors of the device.
      weights_in_registers: weight-only: convert the weights in registers, not by way of shared memory. The interpreter
        does not run it.
    """

    rows: int
    warpgroups: int
    slots: int
    programs: int = 132
    weights_in_registers: bool = False


# Up to 64 rows the weights are the traffic: narrow programs, so that all multiprocessors read, and deep copies. Above,
# two warpgroups share the rows' tile.
FEW_ROWS = Blocks(rows=64, warpgroups=1, slots=12)
MANY_ROWS = Blocks(rows=256, warpgroups=2, slots=4)


@dataclass(frozen=True)
class Tiling:
    """Of one call: rows and features a tile, elements of D a copy, copies in flight, tiles along rows and features."""

    rows: int
    features: int
    depth: int
    slots: int
    row_tiles: int
    feature_tiles: int


def matmul(
    x: Array, values: Array, scale: Array, layer: Array, *, quantize_activations: bool, out_dtype: Any, interpret: Any
) -> Array:
    """See `contract.Int8MatmulImplementation`."""
    default = FEW_ROWS if x.shape[0] <= INSTRUCTION_ROWS else MANY_ROWS
    form = "weights and activations" if quantize_activations else "weights"
    tuned = tuning.lookup("int8_matmul", current_device().kind, form=form, rows=x.shape[0], in_features=x.shape[1])
    blocks = Blocks(**tuned) if tuned else default
    return tiled_matmul(x, values, scale, layer, blocks, quantize_activations, out_dtype, interpret)


def tiled_matmul(
    x: Array, values: Array, scale: Array, layer: Array, blocks: Blocks, quantize_activations: bool, out_dtype: Any,
    interpret: Any,
) -> Array:  # fmt: skip
    """As `matmul`, with given blocks."""
    num_rows, out_features = x.shape[0], values.shape[1]
    sizes = (1 if quantize_activations else 2, jnp.dtype(out_dtype).itemsize)
    tiling = choose_tiling(num_rows, x.shape[1], out_features, sizes, blocks)
    padded_rows, padded_features = tiling.row_tiles * tiling.rows, tiling.feature_tiles * tiling.features
    if quantize_activations:
        x, x_scale = quantize(x, padded_rows, interpret)
    else:
        x = jnp.pad(x, ((0, padded_rows - num_rows), (0, 0)))
        x_scale = jnp.ones((padded_rows,), jnp.float32)
    scale = jnp.pad(scale, ((0, 0), (0, padded_features - out_features)))
    # What leaves transposed must be 16 bits wide; float32 sums are transposed behind the kernel.
    transposes = jnp.dtype(out_dtype).itemsize == 2
    shape = (padded_rows, padded_features) if transposes else (padded_features, padded_rows)
    kernel = plgpu.kernel(
        lambda *references, **scratch: persistent_kernel(*references, **scratch, tiling=tiling, blocks=blocks),
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        grid=(min(blocks.programs, tiling.row_tiles * tiling.feature_tiles),),
        grid_names=("program",),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types(tiling, blocks, x.dtype, out_dtype, transposes),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    result = kernel(layer, x, values, x_scale, scale)
    return (result if transposes else result.T)[:num_rows, :out_features]


def quantize(x: Array, padded_rows: int, interpret: Any) -> tuple[Array, Array]:
    """(i8[padded_rows, D], f32[padded_rows]) of x [T, D] as `contract` defines it; what is behind row T is undefined.

    Where no whole vectors of a warpgroup fill a row, XLA does it.
    """
    num_rows, width = x.shape
    part = next((part for part in QUANTIZED_PARTS if width % part == 0), None)
    if part is None:
        quantized, x_scale = quantize_rows(x)
        padding = (0, padded_rows - num_rows)
        return jnp.pad(quantized, (padding, (0, 0))), jnp.pad(x_scale[:, 0], padding)
    kernel = plgpu.kernel(
        partial(quantize_kernel, part=part),
        out_type=(
            jax.ShapeDtypeStruct((padded_rows, width), jnp.int8),
            jax.ShapeDtypeStruct((padded_rows,), jnp.float32),
        ),
        grid=(num_rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(x)


def quantize_kernel(x_ref, quantized_ref, x_scale_ref, *, part: int) -> None:
    """One row: its largest value, then its quotients; the second reading comes from the cache."""
    row = lax.axis_index("row")
    layout = plgpu.Layout.WG_STRIDED((part,), vec_size=min(8, part // 128))
    num_parts = x_ref.shape[1] // part

    def values(k):
        return plgpu.load(x_ref.at[row, pl.ds(k * part, part)], layout=layout, optimized=False).astype(jnp.float32)

    zeros = plgpu.layout_cast(jnp.zeros((part,), jnp.float32), layout)
    by_place = lax.fori_loop(0, num_parts, lambda k, largest: jnp.maximum(largest, jnp.abs(values(k))), zeros)
    largest = jnp.maximum(jnp.max(by_place), SMALLEST_MAXIMUM)
    factor = 127 / largest
    x_scale_ref[row] = largest * (1 / 127)

    @pl.loop(0, num_parts)
    def _(k):
        rounded = jnp.rint(values(k) * factor).astype(jnp.int32)
        quantized_ref[row, pl.ds(k * part, part)] = rounded.astype(jnp.int8)


def scratch_types(tiling: Tiling, blocks: Blocks, x_dtype: Any, out_dtype: Any, transposes: bool) -> dict[str, Any]:
    """Slots of x and weights, a stored part a warpgroup, converted weights, barriers."""
    stored = stored_rows(tiling.rows)
    part = (stored, INSTRUCTION_ROWS) if transposes else (INSTRUCTION_ROWS, stored)
    types = {
        "x_slots": swizzled((tiling.slots, tiling.rows, tiling.depth), x_dtype),
        "weight_slots": swizzled((tiling.slots, tiling.features, tiling.depth), jnp.int8),
        "out_parts": swizzled((blocks.warpgroups, *part), out_dtype),
        "filled": plgpu.Barrier(num_arrivals=2, num_barriers=tiling.slots),
        "emptied": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=tiling.slots),
    }
    if x_dtype != jnp.int8 and not blocks.weights_in_registers:
        types["converted"] = swizzled((blocks.warpgroups, INSTRUCTION_ROWS, tiling.depth), x_dtype)
    return types


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the tiles that TMA writes and the matrix unit reads without bank conflicts."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next((bytes_ for bytes_ in SWIZZLES if shape[-1] * itemsize % bytes_ == 0), None)
    if swizzle is None:
        return plgpu.SMEM(shape, dtype)
    tiling = plgpu.TilingTransform((TILE_ROWS, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # pyright: ignore[reportAbstractUsage]


def persistent_kernel(
    layer_ref, x_ref, values_ref, x_scale_ref, scale_ref, out_ref, *, tiling: Tiling, blocks: Blocks,
    x_slots, weight_slots, out_parts, filled, emptied, converted=None,
) -> None:  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    layer = layer_ref[0]
    depth_steps = values_ref.shape[2] // tiling.depth
    num_tiles = tiling.row_tiles * tiling.feature_tiles
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    own_tiles = lax.div(num_tiles - program + programs - 1, programs)
    num_steps = own_tiles * depth_steps

    def origin(tile):
        """First row and first feature of this program's tile; neighbours share features, so that weights stay in L2."""
        index = program + tile * programs
        rows = pl.multiple_of(lax.rem(index, tiling.row_tiles) * tiling.rows, TILE_ROWS)
        return rows, pl.multiple_of(lax.div(index, tiling.row_tiles) * tiling.features, INSTRUCTION_ROWS)

    @pl.when(warpgroup == blocks.warpgroups)
    def _():
        if blocks.warpgroups > 1:
            plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")

        @pl.loop(0, num_steps)
        def _(step):
            slot = lax.rem(step, tiling.slots)
            row, feature = origin(lax.div(step, depth_steps))
            depth = pl.ds(lax.rem(step, depth_steps) * tiling.depth, tiling.depth)

            @pl.when(step >= tiling.slots)
            def _():
                plgpu.barrier_wait(emptied.at[slot])

            weights = values_ref.at[layer, pl.ds(feature, tiling.features), depth]
            plgpu.copy_gmem_to_smem(weights, weight_slots.at[slot], filled.at[slot])
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, tiling.rows), depth], x_slots.at[slot], filled.at[slot])

    @pl.when(warpgroup < blocks.warpgroups)
    def _():
        if blocks.warpgroups > 1:
            plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        own = pl.ds(warpgroup * INSTRUCTION_ROWS, INSTRUCTION_ROWS)

        def release(step):
            @pl.when(step + tiling.slots < num_steps)
            def _():
                plgpu.barrier_arrive(emptied.at[lax.rem(step, tiling.slots)])

        @pl.loop(0, own_tiles)
        def _(tile):
            first = tile * depth_steps

            def multiply(sums_ref):
                @pl.loop(0, depth_steps)
                def _(k):
                    slot = lax.rem(first + k, tiling.slots)
                    plgpu.barrier_wait(filled.at[slot])
                    x_tile = x_slots.at[slot].transpose((1, 0))
                    if sums_ref.dtype == jnp.int32:
                        plgpu.wgmma(sums_ref, weight_slots.at[slot, own], x_tile)
                        plgpu.wgmma_wait(1)
                        pl.when(k > 0)(lambda: release(first + k - 1))
                    else:
                        multiply_converted(sums_ref, weight_slots.at[slot, own], x_tile, converted, warpgroup)
                        release(first + k)

                plgpu.wgmma_wait(0)
                if sums_ref.dtype == jnp.int32:
                    release(first + depth_steps - 1)
                return sums_ref[...]

            sums_type = jnp.int32 if x_slots.dtype == jnp.int8 else jnp.float32
            accumulator = plgpu.ACC(  # pyright: ignore[reportPrivateImportUsage]
                (INSTRUCTION_ROWS, tiling.rows), sums_type
            )
            sums = pl.run_scoped(multiply, accumulator)
            row, feature = origin(tile)
            feature = pl.multiple_of(feature + warpgroup * INSTRUCTION_ROWS, INSTRUCTION_ROWS)
            store(sums, row, feature, layer, x_scale_ref, scale_ref, out_ref, out_parts.at[warpgroup])

        plgpu.wait_smem_to_gmem(0)


def multiply_converted(sums_ref, weights_ref, x_tile, converted, warpgroup) -> None:
    """Weight-only: the weights become those of x's dtype in registers, and with `converted` pass through it."""
    weights = plgpu.load(weights_ref, layout=plgpu.Layout.WGMMA).astype(x_tile.dtype)
    if converted is None:
        plgpu.wgmma(sums_ref, weights, x_tile)
    else:
        converted[warpgroup] = weights
        plgpu.commit_smem()
        plgpu.wgmma(sums_ref, converted.at[warpgroup], x_tile)
    plgpu.wgmma_wait(0)


def store(sums, row, feature, layer, x_scale_ref, scale_ref, out_ref, part_ref) -> None:
    """Sums [64, rows] times the scale of each row of x, then of each feature, to the output, part by part."""
    features = pl.ds(feature, INSTRUCTION_ROWS)
    scale = plgpu.load(scale_ref.at[layer, features], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    num_rows = sums.shape[1]
    size = stored_rows(num_rows)
    for start in range(0, num_rows, size):
        rows = pl.ds(pl.multiple_of(row + start, TILE_ROWS), size)
        x_scale = plgpu.load(x_scale_ref.at[rows], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        part = sums[:, start : start + size].astype(jnp.float32)
        part = part * lax.broadcast_in_dim(x_scale, part.shape, (1,)) * lax.broadcast_in_dim(scale, part.shape, (0,))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if out_ref.dtype == jnp.float32:
            part_ref[...] = part
            target = out_ref.at[features, rows]
        else:
            part_ref.transpose((1, 0))[...] = part.astype(out_ref.dtype)
            target = out_ref.at[rows, features]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part_ref, target)


def stored_rows(rows: int) -> int:
    """Rows of a tile of `rows` that leave by one copy: a tile is whole parts."""
    return rows if rows <= STORED_ROWS else math.gcd(rows, STORED_ROWS)


def choose_tiling(
    num_rows: int, in_features: int, out_features: int, itemsizes: tuple[int, int], blocks: Blocks
) -> Tiling:
    """The deepest swizzle that divides D, the narrowest tile that holds the rows, as many slots as fit.

    itemsizes: of x as it is multiplied and of the output.
    """
    x_itemsize, out_itemsize = itemsizes
    depth = next(depth for depth in SWIZZLES if in_features % depth == 0)
    rows = -(-num_rows // TILE_ROWS) * TILE_ROWS
    rows = rows if rows <= STORED_ROWS else min(-(-rows // WIDE_ROWS) * WIDE_ROWS, blocks.rows)
    features = blocks.warpgroups * INSTRUCTION_ROWS
    converted = 0 if x_itemsize == 1 or blocks.weights_in_registers else depth * x_itemsize
    parts = features * (stored_rows(rows) * out_itemsize + converted)
    slots = min(blocks.slots, (SHARED_BYTES - parts) // (depth * (rows * x_itemsize + features)))
    return Tiling(rows, features, depth, slots, -(-num_rows // rows), -(-out_features // features))


def unsupported_reasons(spec: Int8MatmulSpec) -> list[str]:
    reasons = common_reasons(spec) + hopper_reasons(spec.device, spec.interpret)
    if jnp.dtype(spec.dtype).name not in (("bfloat16", "float32") if spec.quantize_activations else ("bfloat16",)):
        served = "bfloat16 and float32" if spec.quantize_activations else "bfloat16"
        reasons.append(f"x has dtype {jnp.dtype(spec.dtype).name}, served are {served} in this form")
    if spec.in_features % SWIZZLES[-1]:
        reasons.append(f"D {spec.in_features} is not a multiple of {SWIZZLES[-1]}, the narrowest swizzled tile")
    if spec.out_features % TILE_ROWS:
        reasons.append(f"F {spec.out_features} is not a multiple of {TILE_ROWS}, the rows of a swizzled tile")
    return reasons


def yielding_reasons(spec: Int8MatmulSpec) -> list[str]:
    if not spec.quantize_activations:
        return ["XLA fuses the conversion of the weights into its own matmul"]
    return []


IMPLEMENTATION = Int8MatmulImplementation("gpu", True, unsupported_reasons, matmul, yielding_reasons)
