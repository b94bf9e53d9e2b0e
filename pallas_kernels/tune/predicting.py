"""Candidates compiled for a TPU that is not here, and their machine code executed for the class's lengths.

`compile_candidate` is a job of `pallas_kernels.aot.toolchain`. Everything it gives is predicted.
"""

import jax

from pallas_kernels.aot import toolchain
from pallas_kernels.aot.counting import execute_calls, hot_loop
from pallas_kernels.aot.kernel_operands import kernel_calls
from pallas_kernels.aot.programs import program_of
from pallas_kernels.aot.targets import target
from pallas_kernels.tune.choosing import Trial
from pallas_kernels.tune.operations import OPERATIONS, Blocks, Key

JOB = "pallas_kernels.tune.predicting:compile_candidate"
# What the compiler says when blocks do not fit; anything else is a defect of the kernel or of this tool.
DOES_NOT_FIT = ("vmem", "smem", "scoped", "RESOURCE_EXHAUSTED")
UNIT = "predicted cycles"


def predict(operation: str, key: Key, blocks: Blocks, target_name: str) -> Trial:
    """One candidate, in a process of its own.

    Raises as `toolchain.run`, but for blocks that do not fit the kernel's memory: they are a trial with an error.
    """
    arguments = {"target_name": target_name, "operation": operation, "key": dict(key), "blocks": blocks}
    try:
        found = toolchain.run(JOB, arguments, "tpu", dump=True)
    except toolchain.JobFailed as failure:
        if any(word.lower() in failure.message.lower() for word in DOES_NOT_FIT):
            return Trial(blocks, error=failure.message.strip().splitlines()[0][:120])
        raise
    return Trial(blocks, **found.value)


def compile_candidate(
    target_name: str, operation: str, key: Key, blocks: Blocks, dump_folder: str
) -> dict[str, float | int]:
    """The job: cost, bundles and spilling of a `Trial`. cost: the larger of bundles and bytes over bandwidth."""
    where = target(target_name)
    mesh = where.mesh()
    with jax.set_mesh(mesh):
        call = OPERATIONS[operation].call(key, blocks)
    calls = [(each.name, each.known()) for each in kernel_calls(call.function, *call.arguments, mesh=mesh)]
    program_of(operation, call).compile(mesh)
    # The fusions around the kernel are the same for every candidate.
    executed = execute_calls(dump_folder, target_name.partition(":")[0], calls, with_fusions=False)
    bundles = sum(each.execution.bundles for each in executed)
    # Bytes of one core, which has its share of the bandwidth.
    num_bytes = sum(each.execution.bytes_in + each.execution.bytes_out for each in executed) * where.chip.num_cores
    largest = max(executed, key=lambda each: each.execution.bundles)
    spilling = largest.schedule.spilling(hot_loop(largest.schedule, largest.execution))
    cost = max(bundles, num_bytes / where.chip.hbm_bytes_per_cycle)
    return {"cost": cost, "bundles": bundles, "spilling": spilling}
