"""Small kernels whose machine code the tests read, and the job that compiles them."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.aot.programs import Program
from pallas_kernels.aot.targets import target

NUM_STEPS = 3


def nested_kernel(lengths, x, out, total):
    """Per grid step i: lengths[i] passes; every third runs a part of its own, each j of them runs lengths[j] passes."""
    total[...] = jnp.zeros_like(total)

    def inner(k, _):
        total[...] += x[...] * k.astype(jnp.float32)

    def outer(j, _):
        @pl.when(j % 3 == 0)
        def rare():
            total[...] = jnp.tanh(total[...])

        jax.lax.fori_loop(0, lengths[j], inner, None)

    jax.lax.fori_loop(0, lengths[pl.program_id(0)], outer, None)
    out[...] = total[...]


def nested(lengths, x):
    """lengths i32[8], x f32[NUM_STEPS * 8, 128]."""
    block = pl.BlockSpec((8, 128), lambda i, *_: (i, 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(NUM_STEPS,), in_specs=[block], out_specs=block,
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
    )  # fmt: skip
    return pl.pallas_call(
        nested_kernel, grid_spec=grid_spec, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="nested",
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
    )(lengths, x)  # fmt: skip


NESTED = Program("nested", nested, (jax.ShapeDtypeStruct((8,), jnp.int32),
                                    jax.ShapeDtypeStruct((NUM_STEPS * 8, 128), jnp.float32)))  # fmt: skip


def compile_nested(target_name: str, keep: str, dump_folder: str) -> list[str]:
    """The job: compiles and keeps the kernel's two dumps in a folder; their names."""
    NESTED.compile(target(target_name).mesh())
    wanted = [
        p for p in sorted(Path(dump_folder).iterdir()) if "-nested" in p.name and "schedule-analysis" not in p.name
    ]
    return [shutil.copy(path, keep) for path in wanted]
