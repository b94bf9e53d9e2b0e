"""Attention and matmul compiled for a TPU, and their machine code executed for given lengths.

`count_programs` is a job of `pallas_kernels.aot.toolchain`: it runs in a process that has libtpu, takes and returns
JSON. Everything it gives is predicted.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as in_jax

from benchmarks.tpu_static.shapes import AttentionShape, Count, MatmulShape
from pallas_kernels import int8_matmul
from pallas_kernels import ragged_paged_attention as attention
from pallas_kernels.aot.counting import Executed, execute_calls, hot_loop
from pallas_kernels.aot.kernel_operands import kernel_calls
from pallas_kernels.aot.programs import Program
from pallas_kernels.aot.targets import target
from pallas_kernels.aot.tpu_execution import Execution
from pallas_kernels.aot.tpu_schedule import FILL, MATRIX, Schedule
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled

# jax's kernel asks for blocks of any size when it may use more than the compiler's default of 16 MiB of VMEM.
VMEM_LIMIT = 100 << 20
SCALE = 0.03
# Of the matmuls' stacks.
NUM_LAYERS = 4
# Of the pages at least: XLA puts smaller arrays into the VMEM of a v6e (128 MiB), and then a page comes by loads and
# stores, as it never would from a server's pool.
POOL_BYTES = 512 << 20


def count_programs(target_name: str, programs: list[dict[str, Any]], dump_folder: str) -> list[dict[str, Any]]:
    """The job. programs: {"kind": a name of KINDS, ...its arguments}; for each the fields of a `Count`, or "error"."""
    where = target(target_name)
    mesh = where.mesh()
    found = []
    for program in programs:
        options = dict(program)
        build = KINDS[options.pop("kind")]
        try:
            found.append(asdict(count(*build(mesh, **options), mesh, where.name.partition(":")[0], dump_folder)))
        except Exception as error:  # a block that does not fit is an answer of the sweep
            found.append({"error": f"{type(error).__name__}: {str(error)[:300]}"})
        for path in Path(dump_folder).iterdir():
            path.unlink()
    return found


def count(
    program: Program, operands: list[tuple[str, dict[int, np.ndarray]]], mesh: jax.sharding.Mesh, chip: str, folder: str
) -> Count:
    """Compiles, and executes each kernel once with its operands (name and integers of each call, in order)."""
    program.compile(mesh)
    executed = execute_calls(folder, chip, operands)
    largest = max(executed, key=lambda each: each.execution.bundles)
    schedule, execution = largest.schedule, largest.execution
    hot = hot_loop(schedule, execution)
    return Count(
        bundles=sum(each.execution.bundles for each in executed),
        around=sum(each.execution.bundles for each in executed if not each.is_kernel),
        bytes_moved=sum(each.execution.bytes_in + each.execution.bytes_out for each in executed),
        hot_bundles=hot.all_bundles,
        hot_passes=execution.runs(hot),
        spilling=schedule.spilling(hot),
        fills=hot.total(FILL),
        step_fill=step_fill(schedule, execution),
        whole_fill=whole_fill(executed),
    )


def step_fill(schedule: Schedule, execution: Execution) -> float:
    """Share of the matrix units' slots in use in one pass through the part (a loop, or what a branch skips) that issues
    most bundles, with a pass of the loops around it.
    """
    busiest = max(schedule.root.walk(), key=lambda region: region.bundles * execution.runs(region))
    around = [region for region in schedule.root.walk() if region.first <= busiest.first <= busiest.last <= region.last]
    bundles = sum(region.bundles for region in around if region is not schedule.root or region is busiest)
    return busiest.use[MATRIX] / (schedule.capacity[MATRIX] * bundles)


def whole_fill(executed: list[Executed]) -> float:
    """Share of those slots in use over all bundles that a program issued."""
    used = sum(
        count * use[MATRIX] / each.schedule.capacity[MATRIX]
        for each in executed
        for count, use in zip(each.execution.counts, each.schedule.utilization, strict=True)
    )
    return used / sum(each.execution.bundles for each in executed)


type Built = tuple[Program, list[tuple[str, dict[int, np.ndarray]]]]


def jax_attention(mesh: jax.sharding.Mesh, pages: int, queries: int, **fields: Any) -> Built:
    """The kernel that ships in jax, with blocks of so many pages and queries. It writes no keys and values."""
    shape = AttentionShape(**fields)
    pages_a_row, tokens = shape.context // shape.page_size, shape.rows * shape.q_len
    scales = {"k_scale": SCALE, "v_scale": SCALE} if is_scaled(shape.kv_dtype) else {}
    step = functools.partial(
        in_jax.ragged_paged_attention, sm_scale=shape.head_dim**-0.5, num_kv_pages_per_block=pages,
        num_queries_per_block=queries, vmem_limit_bytes=VMEM_LIMIT, **scales,
    )  # fmt: skip
    kv = (pool_pages(shape), shape.page_size, 2 * shape.num_kv_heads, shape.head_dim)
    known = (
        np.full(shape.rows, shape.context, np.int32),
        np.arange(shape.rows * pages_a_row, dtype=np.int32).reshape(shape.rows, pages_a_row),
        np.arange(shape.rows + 1, dtype=np.int32) * shape.q_len,
        np.array([shape.rows], np.int32),
    )
    arrays = (_shape((tokens, shape.num_q_heads, shape.head_dim)), _shape(kv, shape.kv_dtype))
    calls = kernel_calls(step, *arrays, *known, mesh=mesh)
    program = Program("jax", step, (*arrays, *(_shape(a.shape, a.dtype) for a in known)))
    return program, [(call.name, call.known()) for call in calls]


def our_attention(mesh: jax.sharding.Mesh, **fields: Any) -> Built:
    """Ours as a layer calls it: the schedule is an argument, made once a step; new keys and values are written. The
    pages are of one layer: with more, the largest load is beyond the memory of a v5e.
    """
    shape = AttentionShape(**fields)
    pages_a_row, tokens = shape.context // shape.page_size, shape.rows * shape.q_len
    pages = attention.kv_pages_shape(1, pool_pages(shape), shape.page_size, shape.num_kv_heads, shape.head_dim,
                                     shape.kv_dtype, implementation="tpu")  # fmt: skip
    classes = [shape.rows * (shape.q_len == 1), shape.rows * (shape.q_len == 1), shape.rows]
    known = (
        np.full(shape.rows, shape.context, np.int32),
        np.arange(shape.rows * pages_a_row, dtype=np.int32).reshape(shape.rows, pages_a_row),
        np.arange(shape.rows + 1, dtype=np.int32) * shape.q_len,
        np.array(classes, np.int32),
    )
    new = _shape((tokens, shape.num_kv_heads, shape.head_dim))
    arrays = (_shape((tokens, shape.num_q_heads, shape.head_dim)), new, new, _shape(pages, shape.kv_dtype))
    scales = (_shape((shape.num_kv_heads,), "float32"),) * 2 if is_scaled(shape.kv_dtype) else (None, None)
    max_q_len = 1 if shape.q_len == 1 else None

    def schedule(*lengths):
        return attention.make_schedule(
            *lengths, num_tokens=tokens, page_size=shape.page_size, num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, dtype=jnp.bfloat16, kv_dtype=shape.kv_dtype,
            max_q_len=max_q_len, implementation="tpu",
        )  # fmt: skip

    def layer(queries, keys, values, kv_pages, number, kv_lens, table, cu_q_lens, distribution, k_scale, v_scale, work):
        return attention.ragged_paged_attention(
            queries, keys, values, kv_pages, number, kv_lens, table, cu_q_lens, distribution, schedule=work,
            scale=shape.head_dim**-0.5, k_scale=k_scale, v_scale=v_scale, max_q_len=max_q_len, implementation="tpu",
        )  # fmt: skip

    def step(*arguments: Any):
        return layer(*arguments, schedule(*arguments[5:9]))  # type: ignore[call-arg]

    calls = kernel_calls(step, *arrays, np.int32(0), *known, *scales, mesh=mesh)
    lengths = tuple(_shape(a.shape, a.dtype) for a in known)
    with jax.set_mesh(mesh):
        work = jax.eval_shape(schedule, *lengths)
    program = Program("ours", layer, (*arrays, _shape((), "int32"), *lengths, *scales, work), donated=(3,))
    return program, [(call.name, call.known()) for call in calls]


def pool_pages(shape: AttentionShape) -> int:
    """As many as the rows need, and POOL_BYTES at least."""
    page_bytes = shape.kv_bytes * shape.page_size // (shape.rows * shape.context)
    return max(shape.rows * shape.context // shape.page_size, POOL_BYTES // page_bytes)


def matmul(mesh: jax.sharding.Mesh, implementation: str, **fields: Any) -> Built:
    """int8 weights times bfloat16 rows that are quantised too, as a scan over layers calls it: with the stack and the
    layer's number. What is outside of the loop counts with it, a few bundles. All layers have the same rows: where XLA
    quantises them before the loop, that is counted once, as it would be in a layer.
    """
    shape = MatmulShape(**fields)
    stack = (NUM_LAYERS, shape.out_features)

    def layers(x, values, scale):
        def layer(_, number):
            product = int8_matmul.int8_matmul(x, values, scale, quantize_activations=True, layer=number,
                                              implementation=implementation)  # fmt: skip
            return product, None

        result = jnp.zeros((shape.rows, shape.out_features), x.dtype)
        return jax.lax.scan(layer, result, jnp.arange(NUM_LAYERS))[0]

    arrays = (_shape((shape.rows, shape.in_features)), _shape((*stack, shape.in_features), "int8"),
              _shape((*stack, 1), "float32"))  # fmt: skip
    calls = [("int8_matmul", {0: np.array([1], np.int32)})] if implementation == "tpu" else []
    return Program("matmul", layers, arrays), calls


KINDS: dict[str, Callable[..., Built]] = {"jax": jax_attention, "ours": our_attention, "matmul": matmul}


def _shape(shape: tuple[int, ...], dtype: Any = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
