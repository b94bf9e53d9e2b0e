"""The job: every program of a model compiled for a target, and what the compiled programs say. JSON in and out."""

import dataclasses
import math
import os
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from benchmarks.aot import hlo, traffic
from benchmarks.aot.cases import DRAFTED, ROWS
from benchmarks.aot.models import MODELS
from benchmarks.aot.partials import Partials
from jaxinfer import memory, programs, sharding, startup
from jaxinfer.errors import OutOfMemory
from jaxinfer.layout import DecodeLayout
from jaxinfer.model import Rows
from jaxinfer.models import make_decoder
from jaxinfer.params import abstract_params, default_layer_loop, layer_loop_of
from jaxinfer.quantization import WEIGHT_FORMATS
from jaxinfer.smallest_steps import smallest_steps
from jaxinfer.start_options import Options
from jaxinfer.types import SamplerForm
from pallas_kernels.aot.targets import Target, target
from pallas_kernels.dispatch import device_of
from pallas_kernels.ragged_paged_attention import AttentionSpec

CONTEXT = 2048
"""Tokens that each row of the decode step has whose bytes are counted."""
FEWEST_COUNTED = 16
"""Rows: more weigh the keys and values more, which are read once whatever XLA makes of the weights."""
VERIFY = ("verify", ROWS)
KERNEL = ("tpu_custom_call", "mosaic_gpu")
HLO_DTYPES = {"bfloat16": "bf16", "float32": "f32", "int8": "s8", "float8_e4m3fn": "f8e4m3fn"}


def compile_case(model: str, target_name: str, quantization: str | None, every: bool) -> dict[str, Any]:
    """The plan's figures and either `error` or those of the programs. Raises what the compiler raises.

    every: all programs that an engine compiles; else only `largest`.
    """
    where = target(target_name)
    mesh = mesh_of(where)
    config = MODELS[model]
    options = Options(model=model, tensor_parallel_size=where.num_devices, quantization=quantization)
    params = abstract_params(
        config, mesh=mesh, layer_loop=default_layer_loop(mesh), weight_format=WEIGHT_FORMATS[quantization]
    )
    decoder = make_decoder(config, dtype=jnp.bfloat16, page_size=options.page_size, mesh=mesh)
    length = startup.choose_max_model_len(options, config.max_position_embeddings)
    began = time.perf_counter()
    budget = int(where.chip.hbm_bytes * options.gpu_memory_utilization)
    try:
        with jax.set_mesh(mesh):  # what is chosen by the device in use is chosen for this one
            plan = startup.plan_within(budget, options, decoder, params, length, on_cpu=False)
    except OutOfMemory as error:
        return {"error": str(error), "weights": memory.weight_bytes(params), "budget": budget}
    planned = time.perf_counter() - began
    least = smallest_steps(device_of(mesh), WEIGHT_FORMATS[quantization])
    engine = startup.engine_config(options, length, plan.num_pages, least)
    signature = startup.abstract_signature(decoder, params, engine)
    found = compile_programs(signature, mesh, every)
    return {
        "plan": dataclasses.asdict(plan),
        "plan_seconds": planned,
        "layer_loop": layer_loop_of(params),
        "attention": decoder.implementation,
        **found,
    }


def mesh_of(where: Target) -> Mesh:
    """The engine's mesh over devices that are not here; also for a single one."""
    shape = (1, where.num_devices, 1)
    return Mesh(np.array(where.devices()).reshape(shape), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def compile_programs(signature: programs.Signature, mesh: Mesh, every: bool) -> dict[str, Any]:
    """Compiles what the engine declares, and the verification step, as a start does; reads what came out."""
    declared = programs.declare(signature)
    declared = declared if every else largest(declared, signature)
    options = untimed_options(signature)
    if options:
        declared = {
            key: replace(program, compiler_options=(program.compiler_options or {}) | options)
            for key, program in declared.items()
        }
    began, cpu, tracing = time.perf_counter(), cpu_seconds(), time.thread_time()
    with jax.set_mesh(mesh):
        compiled = programs.compile_all(declared, workers=min(8, os.cpu_count() or 1), progress=lambda name: None)
    seconds, cpu, tracing = time.perf_counter() - began, cpu_seconds() - cpu, time.thread_time() - tracing
    compiled[VERIFY] = verify_program(signature).compile()
    names = {key: program.name for key, program in declared.items()} | {VERIFY: f"verify {ROWS} rows of {DRAFTED + 1}"}
    pageless = (programs.SAMPLE, programs.SCORE, programs.LOGITS)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tracing_seconds": tracing,
        "programs": [
            figures(name, compiled[key], key not in pageless, signature, stream_of(signature, key))
            for key, name in names.items()
        ],
        "decode": decode_figures(compiled[counted_key(signature)], signature),
    }


def cpu_seconds() -> float:
    """Of this process and of those it has waited for (ptxas)."""
    return sum(os.times()[:4])


def untimed_options(signature: programs.Signature) -> dict[str, Any]:
    """For GPUs, whose compiler times several forms of a matmul on the card: without one it takes a form that cuts the
    contraction in four and adds partial sums, which it would hardly choose; this keeps the contraction whole.
    """
    (device, *_) = signature.replicated.device_set
    return {"xla_gpu_experimental_force_split_k": 1} if device.platform in ("gpu", "cuda") else {}


def counted_rows(signature: programs.Signature) -> int:
    return next(rows for rows in signature.batcher.config.row_buckets if rows >= FEWEST_COUNTED)


def counted_key(signature: programs.Signature) -> programs.Key:
    """The decode program whose bytes are counted."""
    return programs.decode_key(DecodeLayout(counted_rows(signature), 1, 1, 1), SamplerForm.GREEDY)


def largest(
    declared: dict[programs.Key, programs.Program], signature: programs.Signature
) -> dict[programs.Key, programs.Program]:
    """What the memory plan measures, and the decode program that is counted."""
    return {key: declared[key] for key in (*programs.largest(declared), counted_key(signature))}


def verify_program(signature: programs.Signature) -> programs.Program:
    """The model's part of a verification step: every row's last token and its drafted ones, the likeliest next ones."""
    model: Any = signature.model
    state = signature.state
    pages_a_row = state.rows.page_table.shape[1]
    tokens = ROWS * (DRAFTED + 1)

    def verify(params, kv_pages, ids, positions, rows):
        hidden, kv_pages = model.forward(params, ids, positions, kv_pages, rows, max_q_len=DRAFTED + 1)
        return kv_pages, jnp.argmax(model.logits(params, hidden), axis=-1)

    ints: Any = signature.host_array
    rows = Rows(ints(ROWS), ints(ROWS, pages_a_row), ints(ROWS + 1), ints(3))
    arguments = (signature.params, state.kv_pages, ints(tokens), ints(tokens), rows)
    places = (state.kv_pages.sharding, signature.replicated)
    options = programs.compiler_options(signature)
    return programs.Program("verify", verify, arguments, (1,), places, options)


def figures(
    name: str,
    compiled: jax.stages.Compiled,
    donates: bool,
    signature: programs.Signature,
    stream: tuple[int, ...] | None,
) -> dict[str, Any]:
    """Bytes on one device, and copies of whole weights or pages. stream: see `stream_of`."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise RuntimeError(f"{name}: the compiler gives no memory analysis")
    module = hlo.parse(compiled.as_text() or "")
    return {
        "name": name,
        "donates": donates,
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "allowed": allowed_temporaries(name, signature),
        "copies": traffic.copies(module, protected(signature), stream),
    }


def allowed_temporaries(name: str, signature: programs.Signature) -> int:
    """Bytes: fewer than one layer's weights, and in a prefill program what its widest activations take, in float32."""
    params: Any = signature.params
    config: Any = signature.model
    config = config.config
    layer = memory.weight_bytes(params["layers"]) // config.num_layers
    if not name.startswith("prefill"):
        return layer
    shards = sharding.tensor_parallel_size(signature.replicated.mesh)
    return layer + 2 * 4 * signature.batcher.prefill[-1].num_tokens * config.intermediate_size // shards


def stream_of(signature: programs.Signature, key: programs.Key) -> tuple[int, ...] | None:
    """Dimensions of a prefill program's residual stream: of 1,024 tokens it is an 8B model's keys' weight, turned. None
    where it would be a weight's own.
    """
    model: Any = signature.model
    stream = (key[1], model.config.hidden_size) if key[0] == "prefill" else None
    shapes = {leaf.sharding.shard_shape(leaf.shape)[-2:] for leaf in jax.tree.leaves(signature.params)}
    return None if stream in shapes else stream


def protected(signature: programs.Signature) -> set[tuple[str, tuple[int, ...]]]:
    """What no step may copy: every weight of two dimensions or more, alone or stacked, and the pages."""
    found = set()
    for leaf in [*jax.tree.leaves(signature.params), signature.state.kv_pages]:
        shape = leaf.sharding.shard_shape(leaf.shape)
        shapes = [shape, shape[1:]] if len(shape) > 2 else [shape]
        found |= {traffic.signature(HLO_DTYPES[leaf.dtype.name], each) for each in shapes if np.prod(each) >= 1 << 20}
    return found


def decode_figures(compiled: jax.stages.Compiled, signature: programs.Signature) -> dict[str, Any]:
    """HBM bytes of one round on one device beside the least there can be; the largest contributions; collectives."""
    module = hlo.parse(compiled.as_text() or "")
    pages = signature.state.kv_pages
    local = pages.sharding.shard_shape(pages.shape)
    partials = partials_of(signature)
    attends = 0

    def kernel_bytes(call: hlo.Instruction, computation: hlo.Computation) -> int | None:
        nonlocal attends
        if not any(mark in call.text for mark in KERNEL):
            return None
        operands = [array for name in call.operands for array in computation.instructions[name].arrays]
        attends += any(array.dims == local for array in operands)
        return kernel_traffic(call, operands, local, signature, partials)

    items = traffic.count(module, kernel_bytes)
    total = sum(item.total for item in items)
    return {
        "rows": counted_rows(signature),
        "context": CONTEXT,
        "bytes": total if attends else None,
        "ideal": ideal_bytes(signature),
        "largest": [(item.opcode, item.name, item.each, item.times) for item in items[:12]],
        "collectives": traffic.collectives(module),
    }


def kernel_traffic(
    call: hlo.Instruction,
    operands: list[hlo.Array],
    pages: tuple[int, ...],
    signature: programs.Signature,
    partials: Partials | None,
) -> int:
    """HBM bytes of one kernel call: of pages what the rows need, of a stack of weights one layer, of partial results
    those that there are, all else once.

    A kernel fetches whole pages, and each page of a row once.
    """
    num_layers = pages[0]
    total = 0
    for array in (*operands, *call.arrays):
        if array.dims == pages:
            continue
        if partials is not None and partials.holds(array):
            total += partials.num_bytes(array)
            continue
        stacked = len(array.dims) == 3 and array.dims[0] == num_layers
        total += array.hbm_bytes // (num_layers if stacked else 1)
    if any(array.dims == pages for array in operands):
        total += kv_bytes(signature, page_tokens(signature)) // num_layers
    return total


def partials_of(signature: programs.Signature) -> Partials | None:
    """Of the decode step that is counted; None where another implementation than Hopper's attends."""
    model: Any = signature.model
    if model.implementation != "gpu":
        return None
    shards = sharding.tensor_parallel_size(signature.replicated.mesh)
    num_kv_heads = sharding.sharded_sizes(model.config, shards).num_kv_heads // shards
    spec = AttentionSpec(
        model.config.num_heads // shards, num_kv_heads, model.config.head_dim, signature.batcher.config.page_size,
        kv_dtype=signature.state.kv_pages.dtype, max_q_len=1,
    )  # fmt: skip
    config = signature.batcher.config
    return Partials.of(spec, counted_rows(signature), CONTEXT, config.max_pages_per_row * config.page_size)


def page_tokens(signature: programs.Signature) -> int:
    """Tokens a row's pages hold."""
    size = signature.batcher.config.page_size
    return -(-CONTEXT // size) * size


def kv_bytes(signature: programs.Signature, tokens: int) -> int:
    """Bytes on one device to read `tokens` of each row and to write one, in all layers."""
    pages = signature.state.kv_pages
    local = math.prod(pages.sharding.shard_shape(pages.shape)) * pages.dtype.itemsize
    a_token = local // signature.batcher.config.num_pages // signature.batcher.config.page_size
    return counted_rows(signature) * (tokens + 1) * a_token


def ideal_bytes(signature: programs.Signature) -> int:
    """The least a decode step moves: all weights once, of the embedding the rows' own, the live keys and values."""
    params: Any = signature.params
    model: Any = signature.model
    weights = memory.weight_bytes(params)
    embed = params["embed"]
    if not model.config.tie_word_embeddings:
        weights += counted_rows(signature) * embed.shape[1] * embed.dtype.itemsize - memory.weight_bytes(embed)
    return weights + kv_bytes(signature, CONTEXT)
