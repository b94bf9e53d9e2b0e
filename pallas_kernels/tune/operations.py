"""What is tuned: shape classes, the blocks worth trying for each, and calls with given blocks.

The classes are what shards of models of 8B and 70B parameters need: 8 kv heads on one device, 2 on each of four, 1 on
each of eight. Everything here works without a device.
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
from pallas_kernels.ragged_paged_attention import tpu as attention_tpu
from pallas_kernels.ragged_paged_attention.contract import AttentionSpec
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled
from pallas_kernels.ragged_paged_attention.tpu_decode import DecodeBlocks
from pallas_kernels.tune import gpu_attention
from pallas_kernels.tune.calls import Blocks, Call, Key, shape_of
from pallas_kernels.tune.choosing import MOST_SPILLING

NUM_ROWS = 8
# Of 8B whole (32 query heads) and on four devices, of 70B (64) on eight.
QUERY_HEADS = {8: 32, 2: 8, 1: 8}


@dataclass(frozen=True)
class Operation:
    """classes: keys of `tuned/<name>.json`. candidates: by key and platform, of equal ones the last wins. call: for
    a key with given blocks, to be made where the device in use is the one that it is for (`jax.set_mesh`).
    most_spilling: share of the hot loop's bundles that may store a spilled register before a candidate is passed over.
    """

    name: str
    classes: tuple[Key, ...]
    candidates: Callable[[Key, str], list[Blocks]]
    call: Callable[[Key, Blocks], Call]
    most_spilling: float = MOST_SPILLING


def decode_classes() -> tuple[Key, ...]:
    dtypes, heads = ("bfloat16", "int8", "float8_e4m3fn"), itertools.product((8, 2, 1), (64, 128, 256))
    return tuple(
        attention_tpu.decode_key(num_kv_heads, head_dim, dtype, page_size, max_context)
        for (num_kv_heads, head_dim), dtype, page_size, max_context in itertools.product(
            heads, dtypes, (16, 64, 128), (1024, 8192)
        )
    )


def decode_candidates(key: Key, platform: str) -> list[Blocks]:
    """On a TPU: powers of two up to what a row can hold, large ones last: waits at ends of blocks are not predicted.
    What does not fit VMEM is found by compiling. Four blocks in VMEM keep three in flight; how many is no matter of the
    schedule.
    """
    if platform != "tpu":
        return []
    return [asdict(DecodeBlocks(kv=kv, depth=4)) for kv in (256, 512, 1024, 2048) if kv <= int(key["max_context"])]


def decode_call(key: Key, blocks: Blocks) -> Call:
    """A decode step of NUM_ROWS rows, from an eighth of the class's longest context to all of it."""
    num_kv_heads, head_dim = (int(size) for size in str(key["heads"]).split(" x "))
    page_size, max_context, kv_dtype = int(key["page_size"]), int(key["max_context"]), str(key["kv_dtype"])
    pages_a_row, num_q_heads = -(-max_context // page_size), QUERY_HEADS[num_kv_heads]
    shape = attention_tpu.kv_pages_shape(2, NUM_ROWS * pages_a_row, page_size, num_kv_heads, head_dim, kv_dtype)
    spec = AttentionSpec(num_q_heads, num_kv_heads, head_dim, page_size, jnp.bfloat16, kv_dtype, max_q_len=1)
    scales = {"k_scale": shape_of("float32", num_kv_heads), "v_scale": shape_of("float32", num_kv_heads)}
    given = scales if is_scaled(kv_dtype) else {}

    def step(queries, keys, values, pages, layer, kv_lens, page_indices, cu_q_lens, distribution, *options):
        rows = (kv_lens, page_indices, cu_q_lens, distribution)
        schedule = attention_tpu.make_schedule(*rows, num_tokens=NUM_ROWS, spec=spec)
        return attention_tpu.attend(
            queries, keys, values, pages, layer, *rows, schedule=schedule, scale=head_dim**-0.5, max_q_len=1,
            blocks=DecodeBlocks(**blocks), **dict(zip(given, options, strict=True)),
        )  # fmt: skip

    kv_lens = np.array([max_context * (row + 1) // NUM_ROWS - row for row in range(NUM_ROWS)], np.int32)
    table = np.arange(NUM_ROWS * pages_a_row, dtype=np.int32).reshape(NUM_ROWS, pages_a_row)
    known = (np.int32(1), kv_lens, table, np.arange(NUM_ROWS + 1, dtype=np.int32), np.full(3, NUM_ROWS, np.int32))
    new = shape_of("bfloat16", NUM_ROWS, num_kv_heads, head_dim)
    queries = shape_of("bfloat16", NUM_ROWS, num_q_heads, head_dim)
    return Call(step, (queries, new, new, shape_of(kv_dtype, *shape), *known, *given.values()), pages=3)


def matmul_classes() -> tuple[Key, ...]:
    """Weights and activations; D of the attention's and the MLP's matmuls of 8B."""
    sizes = itertools.product((8, 64, 512, 2048), (4096, 14336))
    return tuple({"rows": rows, "in_features": in_features} for rows, in_features in sizes)


def matmul_candidates(key: Key, platform: str) -> list[Blocks]:
    """On a TPU: blocks of 1024 to 128 features, small ones last: the wait for the first block is not predicted."""
    if platform == "tpu":
        rows = (512, 1024) if int(key["rows"]) > 512 else (512,)
        sizes = (int(key["in_features"]) << features for features in range(10, 6, -1))
        return [asdict(matmul_tpu.Blocks(most, size)) for most, size in itertools.product(rows, sizes)]
    few = [matmul_gpu.Blocks(rows=64, warpgroups=1, slots=slots) for slots in (6, 8, 12)]
    many = [matmul_gpu.Blocks(rows, 2, slots) for rows, slots in itertools.product((128, 256), (3, 4, 6))]
    return [asdict(blocks) for blocks in (few if int(key["rows"]) <= 64 else many)]


def matmul_call(key: Key, blocks: Blocks) -> Call:
    """One matmul with 4096 output features, bfloat16 in and out."""
    rows, in_features, out_features = int(key["rows"]), int(key["in_features"]), 4096

    def product(x, values, scale, layer):
        on_gpu = current_device().platform == "gpu"
        tiled = matmul_gpu.tiled_matmul if on_gpu else matmul_tpu.tiled_matmul
        made = matmul_gpu.Blocks(**blocks) if on_gpu else matmul_tpu.Blocks(**blocks)
        return tiled(x, values, scale, layer, made, True, jnp.bfloat16, False)  # type: ignore[arg-type]

    weight = (shape_of("int8", 1, out_features, in_features), shape_of("float32", 1, out_features))
    return Call(product, (shape_of("bfloat16", rows, in_features), *weight, np.zeros(1, np.int32)))


DECODE = Operation("ragged_paged_attention_decode", decode_classes(), decode_candidates, decode_call)
# A product of many rows keeps its sums in VMEM by way of spills, XLA's own does too; stores are not what limits it.
MATMUL = Operation("int8_matmul", matmul_classes(), matmul_candidates, matmul_call, most_spilling=1.0)
GPU_DECODE = Operation(
    gpu_blocks.DECODE, gpu_attention.decode_classes(), gpu_attention.decode_candidates, gpu_attention.decode_call
)
GPU_PREFILL = Operation(
    gpu_blocks.PREFILL, gpu_attention.prefill_classes(), gpu_attention.prefill_candidates, gpu_attention.prefill_call
)
OPERATIONS = {operation.name: operation for operation in (DECODE, GPU_DECODE, GPU_PREFILL, MATMUL)}


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
