"""Named shapes of the int8 matmul, shared by tests and benchmarks, and the arrays of a case."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Int8MatmulCase:
    """x [*leading, D] times values i8[F, D]; `zero_rows` leading rows of x are zero, and so is the first channel.

    num_layers: the weight is one, the last but one, of a stack of as many.
    """

    name: str
    leading: tuple[int, ...]
    in_features: int
    out_features: int
    dtype: str = "float32"
    out_dtype: str | None = None
    zero_rows: int = 0
    scale_has_axis: bool = True
    num_layers: int | None = None


def make_inputs(case: Int8MatmulCase, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, values i8[F, D], scale f32[F, 1] or f32[F]), with a stack i8[L, F, D] and f32[L, F, 1].

    Normal activations with a few large channels, as models have.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*case.leading, case.in_features))
    x[..., :: max(1, case.in_features // 4)] *= 8
    x.reshape(-1, case.in_features)[: case.zero_rows] = 0
    stack = () if case.num_layers is None else (case.num_layers,)
    values = rng.integers(-127, 128, size=(*stack, case.out_features, case.in_features), dtype=np.int8)
    values[..., 0, :] = 0
    scale = rng.uniform(0.001, 0.01, size=(*stack, case.out_features, 1)).astype(np.float32)
    return x.astype(jnp.dtype(case.dtype)), values, scale if case.scale_has_axis else scale[..., 0]


def layer_of(case: Int8MatmulCase) -> int | None:
    return None if case.num_layers is None else max(0, case.num_layers - 2)


CASES: tuple[Int8MatmulCase, ...] = (
    Int8MatmulCase("one_row", (1,), 64, 48),
    Int8MatmulCase("one_row_bfloat16", (1,), 64, 48, dtype="bfloat16"),
    Int8MatmulCase("vector", (), 64, 48),
    Int8MatmulCase("eight_rows", (8,), 256, 128),
    Int8MatmulCase("rows_of_zeros", (5,), 64, 48, zero_rows=2),
    Int8MatmulCase("only_zeros_bfloat16", (2,), 64, 48, dtype="bfloat16", zero_rows=2),
    Int8MatmulCase("batched_bfloat16_to_float32", (2, 3), 96, 33, dtype="bfloat16", out_dtype="float32"),
    Int8MatmulCase("flat_scale", (3,), 32, 16, scale_has_axis=False),
    Int8MatmulCase("odd_sizes", (7,), 129, 31, dtype="bfloat16"),
    Int8MatmulCase("long_contraction", (4,), 4096, 64, dtype="bfloat16"),
    Int8MatmulCase("no_rows", (0,), 64, 48),
    Int8MatmulCase("stack_of_layers", (4,), 64, 48, dtype="bfloat16", num_layers=3),
    Int8MatmulCase("stack_of_eleven", (2,), 64, 48, dtype="bfloat16", num_layers=11, scale_has_axis=False),
    # Row counts of decode and of short prefills; sizes that fill whole blocks, and some that fill none.
    Int8MatmulCase("kernel_one_row", (1,), 512, 384, dtype="bfloat16"),
    Int8MatmulCase("kernel_3_rows_odd_features", (3,), 384, 200, dtype="bfloat16"),
    Int8MatmulCase("kernel_8_rows", (8,), 256, 512, dtype="bfloat16", zero_rows=1),
    Int8MatmulCase("kernel_17_rows_odd_sizes", (17,), 320, 264, dtype="bfloat16"),
    Int8MatmulCase("kernel_64_rows", (64,), 1152, 256, dtype="bfloat16", out_dtype="float32"),
    Int8MatmulCase("kernel_40_rows_wide_blocks", (40,), 256, 2304, dtype="bfloat16"),
    Int8MatmulCase("kernel_200_rows", (200,), 640, 272, dtype="bfloat16", num_layers=2),
)
