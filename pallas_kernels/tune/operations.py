"""What is tuned: shape classes, the blocks worth trying for each, and calls with given blocks. Everything here works
without a device.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import current_device
from pallas_kernels.int8_matmul import gpu as matmul_gpu
from pallas_kernels.int8_matmul import tpu as matmul_tpu
from pallas_kernels.ragged_paged_attention import gpu_blocks
from pallas_kernels.tune import gpu_attention, tpu_attention
from pallas_kernels.tune.calls import Blocks, Call, Key, shape_of


@dataclass(frozen=True)
class Operation:
    """classes: keys of `tuned/<name>.json`. candidates: by key and platform, of equal ones the last wins. call: for
    a key with given blocks, to be made where the device in use is the one that it is for (`jax.set_mesh`).
    """

    name: str
    classes: tuple[Key, ...]
    candidates: Callable[[Key, str], list[Blocks]]
    call: Callable[[Key, Blocks], Call]


def matmul_classes() -> tuple[Key, ...]:
    """Weights and activations; D of the attention's and the MLP's matmuls of 8B."""
    sizes = itertools.product((8, 64, 512, 2048), (4096, 14336))
    return tuple({"rows": rows, "in_features": in_features} for rows, in_features in sizes)


def matmul_candidates(key: Key, platform: str) -> list[Blocks]:
    """On a TPU: blocks of 1024 to 128 features, small ones last: the wait for the first block is not predicted.
    None where neither kernel runs.
    """
    if platform == "tpu":
        rows = (512, 1024) if int(key["rows"]) > 512 else (512,)
        sizes = (int(key["in_features"]) << features for features in range(10, 6, -1))
        columns = (512, 0) if int(key["rows"]) >= 512 else (0,)
        return [asdict(matmul_tpu.Blocks(most, size, sum_columns=some))
                for most, size, some in itertools.product(rows, sizes, columns)]
    if platform != "gpu":
        return []
    few = [matmul_gpu.Blocks(rows=64, warpgroups=1, slots=slots) for slots in (6, 8, 12)]
    many = [matmul_gpu.Blocks(rows, 2, slots) for rows, slots in itertools.product((128, 256), (3, 4, 6))]
    return [asdict(blocks) for blocks in (few if int(key["rows"]) <= 64 else many)]


def matmul_call(key: Key, blocks: Blocks) -> Call:
    """One matmul with 4096 output features, bfloat16 in and out; the form "weights" leaves activations as they are."""
    activations = key.get("form") != "weights"
    rows, in_features, out_features = int(key["rows"]), int(key["in_features"]), 4096

    def product(x, values, scale, layer):
        on_gpu = current_device().platform == "gpu"
        tiled = matmul_gpu.tiled_matmul if on_gpu else matmul_tpu.tiled_matmul
        made = matmul_gpu.Blocks(**blocks) if on_gpu else matmul_tpu.Blocks(**blocks)
        return tiled(x, values, scale, layer, made, activations, jnp.bfloat16, False)  # type: ignore[arg-type]

    weight = (shape_of("int8", 1, out_features, in_features), shape_of("float32", 1, out_features))
    return Call(product, (shape_of("bfloat16", rows, in_features), *weight, np.zeros(1, np.int32)))


DECODE = Operation(
    "ragged_paged_attention_decode", tpu_attention.decode_classes(), tpu_attention.decode_candidates,
    tpu_attention.decode_call,
)  # fmt: skip
PREFILL = Operation(
    "ragged_paged_attention_prefill", tpu_attention.prefill_classes(), tpu_attention.prefill_candidates,
    tpu_attention.prefill_call,
)  # fmt: skip
MATMUL = Operation("int8_matmul", matmul_classes(), matmul_candidates, matmul_call)
GPU_DECODE = Operation(
    gpu_blocks.DECODE, gpu_attention.decode_classes(), gpu_attention.decode_candidates, gpu_attention.decode_call
)
GPU_PREFILL = Operation(
    gpu_blocks.PREFILL, gpu_attention.prefill_classes(), gpu_attention.prefill_candidates, gpu_attention.prefill_call
)
OPERATIONS = {operation.name: operation for operation in (DECODE, PREFILL, GPU_DECODE, GPU_PREFILL, MATMUL)}


def matching(classes: tuple[Key, ...], wanted: Mapping[str, tuple[str, ...]]) -> list[Key]:
    """The classes whose values are among those wanted, by name; names that are not wanted may have any value.

    Raises ValueError where none is left; says what there is.
    """
    unknown = wanted.keys() - classes[0].keys()
    found = [key for key in classes if all(str(key.get(name)) in values for name, values in wanted.items())]
    if unknown or not found:
        there = {name: sorted({str(key[name]) for key in classes}) for name in classes[0]}
        raise ValueError(f"no shape class has {dict(wanted)}; there are {there}")
    return found
