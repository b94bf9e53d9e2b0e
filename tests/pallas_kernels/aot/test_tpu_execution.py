"""Executing the scalar half of kernels: passes of loops that are known from the source, on recorded and new dumps."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.aot import toolchain, tpu_execution, tpu_schedule
from pallas_kernels.aot.kernel_operands import kernel_calls
from pallas_kernels.aot.programs import Program
from pallas_kernels.aot.targets import target
from pallas_kernels.aot.tpu_schedule import UnknownFormat
from tests.pallas_kernels.aot.kernels import NUM_STEPS, nested
from tests.pallas_kernels.aot.test_tpu_schedule import CHIPS, bundles, recorded, used

needs_tpu = pytest.mark.skipif(toolchain.missing("tpu") is not None, reason=str(toolchain.missing("tpu")))
LENGTHS = ([2, 4, 1, 3, 7, 0, 5, 6], [0] * 8, [7, 0, 6, 2, 2, 1, 0, 9])


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_passes_of_the_recorded_kernel(chip, lengths):
    schedule = recorded(chip)
    execution = tpu_execution.execute(schedule, {0: np.array(lengths)})
    (grid,) = schedule.root.loops
    (outer,) = grid.loops
    (inner,) = outer.loops
    steps = lengths[:NUM_STEPS]
    # The grid's loop is a pipeline: a step before the first block and one behind the last.
    assert execution.runs(grid) == NUM_STEPS + 2
    assert execution.runs(outer) == sum(steps)
    assert execution.runs(inner) == sum(sum(lengths[:step]) for step in steps)
    assert execution.runs(outer.regions[0]) == sum(math.ceil(step / 3) for step in steps), "every third j"
    assert execution.bytes_out == NUM_STEPS * 8 * 128 * 4


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_same_passes_are_counted_when_the_kernel_runs_in_the_interpreter(lengths):
    """The same loops around a counter instead of the arithmetic."""

    def counting(lengths, x, out, total):
        def inner(k, passes):
            return passes + 1

        def outer(j, passes):
            return jax.lax.fori_loop(0, lengths[j], inner, passes)

        passes = jax.lax.fori_loop(0, lengths[pl.program_id(0)], outer, 0)
        out[...] = jnp.full_like(out, passes)

    block = pl.BlockSpec((8, 128), lambda i, *_: (i, 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(NUM_STEPS,), in_specs=[block], out_specs=block,
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
    )  # fmt: skip
    x = jnp.zeros((NUM_STEPS * 8, 128), jnp.float32)
    out = pl.pallas_call(counting, grid_spec=grid_spec, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                         interpret=pltpu.InterpretParams())(jnp.array(lengths, jnp.int32), x)  # fmt: skip
    counted = np.asarray(out).reshape(NUM_STEPS, 8, 128)[:, 0, 0]
    schedule = recorded("v5e")
    inner = schedule.root.loops[0].loops[0].loops[0]
    assert tpu_execution.execute(schedule, {0: np.array(lengths)}).runs(inner) == counted.sum()


def program(*bodies: str, delay_slots: int = 0) -> tpu_schedule.Schedule:
    rows = used(*["0 0 0 0 0 0 0 0"] * len(bodies))
    return tpu_schedule.parse("kernel", bundles(*bodies), rows, delay_slots)


SKIPS_ONE = (" : { %2 = sbr.rel (%p1_p0) target = $region3 }", " : {}", " : {} /* Start region 3 */")


@pytest.mark.parametrize(
    ("instruction", "taken"),
    [
        ("%p1_p0 = scmp.lt.s32.totalorder 4294967295, 0", True),
        ("%p1_p0 = scmp.lt.u32.totalorder 4294967295, 0", False),
        ("%p1_p0 = scmp.eq.s32.totalorder %s1_s1, 5", True),
        ("%p1_p0 = pnand %p0_p7, %p0_p7", True),
        ("%p1_p0 = por %p0_p7, %p0_p7", False),
    ],
)
def test_predicates_decide_branches(instruction, taken):
    schedule = program(" : { %s1_s1 = smov 5 }", f" : {{ {instruction} }}", *SKIPS_ONE)
    assert tpu_execution.execute(schedule, {}).counts == (1, 1, 1, 0 if taken else 1, 1)


@pytest.mark.parametrize(
    ("instruction", "value"),
    [
        ("%s2_s2 = sadd.s32 4294967295, %s1_s1", 4),
        ("%s2_s2 = ssub.s32 %s1_s1, 6", 0xFFFFFFFF),
        ("%s2_s2 = sshra.s32 4294967288, 1", 0xFFFFFFFC),
        ("%s2_s2 = sshrl.u32 4294967288, 1", 0x7FFFFFFC),
        ("%s2_s2 = sshll.u32 %s1_s1, 30", 0x40000000),
        ("%s2_s2 = smul.u32 %s1_s1, 7", 35),
        ("%s2_s2 = sand.u32 (!%p0_p7), 4, %s1_s1", 4),
        ("%s2_s2 = sand.u32 (%p0_p7), 4, %s1_s1", 0),
        ("%s2_s2 = smov (!%p0_p7, %s8_s2), %s1_s1", 5),
        ("%s2_s2 = scalar_select /*predicate=*/%p0_p7, /*on_true=*/1, /*on_false=*/%s1_s1", 5),
        ("%s2_s2 = scalar_lea.smem [#allocation0 + $0x2], %s1_s1", 7),
        ("%s2_s2 = sld [smem:[#allocation4 + %s1_s1]]", 0),
    ],
)
def test_scalar_arithmetic(instruction, value):
    schedule = program(" : { %s1_s1 = smov 5 }", f" : {{ {instruction} }}",
                       f" : {{ %p1_p0 = scmp.eq.s32.totalorder %s2_s2, {value} }}", *SKIPS_ONE)  # fmt: skip
    assert tpu_execution.execute(schedule, {}).counts[4] == 0


def test_a_bundle_reads_before_it_writes_and_delay_slots_run():
    schedule = program(" : { %s1_s1 = smov 0 ;; %s2_s2 = smov 3 }",
                       "LB: > { %s3_s1 = smov %s2_s2 ;; %s4_s2 = sadd.s32 1, %s1_s1 } /* Start region 1 */",
                       " : { %p1_p0 = scmp.lt.s32.totalorder %s4_s2, 4 }",
                       " : { %2 = sbr.rel (%p1_p0) target = $region1 }", " : { %s5_s2 = sadd.s32 2, %s4_s2 }",
                       " : {}", delay_slots=1)  # fmt: skip
    # (s1, s2): (0, 3) -> swapped (3, 1) + 2 -> (3, 3); -> (3, 4): leaves.
    assert tpu_execution.execute(schedule, {}).counts == (1, 2, 2, 2, 2, 1)


def test_an_operand_is_in_its_register_before_the_first_bundle_writes_there():
    schedule = program(
        " : { %s1_s1 = smov 7 ;; %s9_s1 = inlined_call_operand.vmem [shape: s32[8], index: 2] }",
        " : { %p1_p0 = scmp.eq.s32.totalorder %s1_s1, 7 }", *SKIPS_ONE)  # fmt: skip
    assert tpu_execution.execute(schedule, {}).counts[3] == 0


def test_dmas_count_bytes_and_fill_scalar_memory():
    schedule = program(
        " : { %s1_s1 = inlined_call_operand.hbm [shape: s32[300], index: 0, kind: input] }",
        " : { %s3_s3 = smov [#allocation2] }",
        " : { %1 = dma.hbm_to_smem %s1_s1, 48, %s3_s3, [#allocation1] }",
        " : { %s4_s4 = sld [smem:[#allocation2 + $0x101]] }",
        " : { %2 = dma.vmem_to_hbm [thread:$0] (%p0_p7), %s9_s9, 8, %s9_s9, %s9_s9 }",
        " : { %3 = dma.vmem_to_hbm [thread:$0] (!%p0_p7), %s9_s9, 16, %s9_s9, %s9_s9 }",
        " : { %p1_p0 = scmp.eq.s32.totalorder %s4_s4, 257 }",
        *SKIPS_ONE)  # fmt: skip
    execution = tpu_execution.execute(schedule, {0: np.arange(300)})
    assert (execution.counts[8], execution.bytes_in, execution.bytes_out) == (0, 0, 16 * 32)


def test_what_the_other_core_says_is_zero():
    bodies = (" : { %v1_v0 = vpop.ccrf }", " : { %7 = vpush %v1_v0 }", " : { %s1_s1 = spop %7 }",
              " : { %p1_p0 = scmp.eq.s32.totalorder %s1_s1, 0 }")  # fmt: skip
    assert tpu_execution.execute(program(*bodies, *SKIPS_ONE), {}).counts == (1, 1, 1, 1, 1, 0, 1)


@pytest.mark.parametrize(
    ("bodies", "complaint"),
    [
        ([" : { %s1_s1 = sfrobnicate.s32 1, 2 }"], "sfrobnicate"),
        ([" : { %s1_s1 = spop %v3 }"], "spop"),
        ([" : { %1 = sbr.rel target = $region1 } /* Start region 1 */", " : {}"], "not ended"),
        ([" : { %1 = sbr.rel (%p1_p0) target = $region1 ;; %2 = sbr.rel (%p1_p0) target = $region1 }",
          " : {} /* Start region 1 */"], "second branch"),
    ],
)  # fmt: skip
def test_what_cannot_be_executed_is_an_error(bodies, complaint, monkeypatch):
    monkeypatch.setattr(tpu_execution, "MAX_BLOCKS", 1000)
    with pytest.raises(UnknownFormat, match=complaint):
        tpu_execution.execute(program(*bodies), {})


# Operands: what a function gives its kernels.


def call_nested(lengths, x, *, shift: int):
    """Lengths that XLA computes, and a second kernel that depends on the first one's result."""
    first = nested(jnp.where(lengths > 2, lengths - shift, lengths), x)
    return jax.jit(nested)(jnp.cumsum(lengths)[::-1], first)


X = jax.ShapeDtypeStruct((NUM_STEPS * 8, 128), jnp.float32)


def test_operands_are_evaluated_as_far_as_they_are_known():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    lengths = np.array(LENGTHS[0], np.int32)
    first, second = kernel_calls(functools.partial(call_nested, shift=2), lengths, X, mesh=mesh)
    assert {first.name, second.name} == {"nested"}
    assert list(first.known()) == [0] and first.operands[1] is None
    np.testing.assert_array_equal(first.known()[0], np.where(lengths > 2, lengths - 2, lengths))
    np.testing.assert_array_equal(second.known()[0], np.cumsum(lengths)[::-1])


def test_a_kernel_in_a_loop_cannot_be_listed():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    lengths = np.array(LENGTHS[0], np.int32)
    with pytest.raises(ValueError, match="inside scan"):
        kernel_calls(
            lambda lengths, x: jax.lax.fori_loop(0, 3, lambda _, x: nested(lengths, x), x), lengths, X, mesh=mesh
        )


# jax's own kernel, whose loops are known from its source: rows, blocks of queries and blocks of pages.


def count_jax_kernel(num_rows: int, context: int, pages: int, queries: int, dump_folder: str) -> dict:
    """The job: passes of the loops of a decode step, compiled for a v6e."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    shapes = ((num_rows, 32, 128), (1024, 16, 16, 128))
    lengths = (
        np.full(num_rows, context, np.int32),
        np.zeros((num_rows, 128), np.int32),
        np.arange(num_rows + 1, dtype=np.int32),
    )
    arguments = [
        *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
        *lengths,
        np.array([num_rows], np.int32),
    ]
    step = functools.partial(ragged_paged_attention, num_kv_pages_per_block=pages, num_queries_per_block=queries)
    mesh = target("v6e:1").mesh()
    Program("jax", step, tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments)).compile(mesh)
    schedule = next(s for s in tpu_schedule.collect(dump_folder, "v6e") if s.kernel.startswith("ragged"))
    (call,) = kernel_calls(step, *arguments, mesh=mesh)
    execution = tpu_execution.execute(schedule, call.known())
    loops = [region for region in schedule.root.walk() if region.kind == "loop"]
    return {"passes": [execution.runs(loop) for loop in loops], "bytes": execution.bytes_in}


@needs_tpu
def test_passes_of_the_kernel_in_jax_are_those_of_its_source():
    arguments = {"num_rows": 12, "context": 1000, "pages": 8, "queries": 4}
    job = "tests.pallas_kernels.aot.test_tpu_execution:count_jax_kernel"
    found = toolchain.run(job, arguments, "tpu", dump=True).value
    blocks_a_row = math.ceil(1000 / (8 * 16))
    assert found["passes"] == [12 // 4 + 2, 12, 12 * blocks_a_row]
    # Whole blocks are fetched, beyond a row's end too.
    queries, page = 12 * 32 * 128 * 2, 16 * 16 * 128 * 2
    assert found["bytes"] == queries + 12 * blocks_a_row * 8 * page
