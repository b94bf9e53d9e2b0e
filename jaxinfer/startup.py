"""From a model folder to a running core: load, plan memory, compile, start the engine's thread."""

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

from jaxinfer import (
    compile_cache,
    draft_lengths,
    grammar,
    implementations,
    kv_scales,
    loading,
    memory,
    programs,
    row_state,
    sharding,
    steps,
)
from jaxinfer.batch import Batcher
from jaxinfer.chat_template import ChatTemplate, render_bounds
from jaxinfer.compile_counter import CompileCounter
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.core import Core, ModelInfo
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.draft_pair import DraftPair, has_plain_programs
from jaxinfer.drafting import check_drafter, remote_drafts, with_drafter
from jaxinfer.engine import Engine
from jaxinfer.engine_thread import EngineThread
from jaxinfer.errors import InvalidConfig, ModelFormatError
from jaxinfer.executor import Executor
from jaxinfer.intake import GenerationDefaults, Intake
from jaxinfer.models import Decoder, make_decoder
from jaxinfer.page_pool import PagePool
from jaxinfer.params import Params, default_layer_loop, flatten_specs, param_specs
from jaxinfer.quantization import WEIGHT_FORMATS
from jaxinfer.remote_drafts import RemoteDrafts
from jaxinfer.scheduler import Scheduler
from jaxinfer.smallest_steps import SmallestSteps, smallest_steps
from jaxinfer.start_options import Options
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.validation import Limits
from pallas_kernels.dispatch import device_of
from pallas_kernels.ragged_paged_attention.page_dtypes import is_scaled

DEFAULT_MAX_MODEL_LEN = 32_768
"""Longest context taken without being asked: many models allow far more than a first try should reserve."""

KV_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""`kv_cache_dtype`; "auto" is the dtype of the activations."""


@dataclass(frozen=True, slots=True)
class StartReport:
    """How the start went, for people: seconds and counts. implementations: pairs of operation and name."""

    memory: memory.MemoryPlan
    attention: str
    implementations: tuple[tuple[str, str], ...]
    num_programs: int
    load_seconds: float
    compile_seconds: float
    cache: str


@dataclass(frozen=True, slots=True)
class Started:
    """A running core and what it took to get there."""

    core: Core
    executor: Executor
    report: StartReport


def start(options: Options, say: Callable[[str], None] = lambda line: None) -> Started:
    """Loads and warms up a model; returns when it is ready to serve. `say` hears a line for each stage.

    Raises ModelFormatError, InvalidConfig or OutOfMemory.
    """
    began = time.monotonic()
    options.validate()
    mesh = sharding.make_mesh(options.tensor_parallel_size) if options.tensor_parallel_size != 1 else None
    folder = loading.model_folder(options.model)
    dtype = choose_dtype(options.dtype, folder)
    defaults = GenerationDefaults.from_folder(folder)
    model, chosen = choose_implementations(options, folder, dtype, mesh)
    max_model_len = choose_max_model_len(options, loading.read_config(folder).max_position_embeddings)
    check_drafter(options, folder, max_model_len, dtype, mesh)
    loaded = loading.load_model(options.model, dtype=dtype, mesh=mesh, quantization=options.quantization)
    tokenizer, template = read_text_files(options, folder)
    loaded_at = time.monotonic()
    num_parameters = count_params(loaded.config, mesh)
    say(f"loaded {loaded.config.family} with {num_parameters:,} parameters in {loaded_at - began:.1f} s; weights: "
        f"{loaded.quantization or jnp.dtype(dtype).name}, pages: {model.kv_dtype.name}")
    say(f"implementations on {jax.devices()[0].device_kind}:\n{implementations.table(chosen)}")
    with compile_cache.open_cache(options.compile_cache) as cache:
        params = implementations.with_matmul(with_kv_scales(model, loaded, tokenizer, say), options.int8_matmul)
        served, params = with_drafter(options, model, params, max_model_len, say)
        grammars = grammar.are_possible(tokenizer)
        plan = plan_memory(options, served, params, max_model_len, grammars)
        say(f"memory on each device:\n{plan.table()}")
        least = smallest_steps(device_of(mesh), WEIGHT_FORMATS[loaded.quantization])
        config = replace(engine_config(options, max_model_len, plan.num_pages, least), grammars=grammars)
        executor = Executor(served, params, config, sharding.replicated(mesh))
        num_programs = warm_up(executor, options.show_progress)
    compiled_at = time.monotonic()
    say(f"compiled {num_programs} programs in {compiled_at - loaded_at:.1f} s; {cache.report}")
    report = StartReport(plan, model.implementation, tuple(chosen), num_programs, loaded_at - began,
                         compiled_at - loaded_at, str(cache.report))
    drafts = measured_drafts(executor, config, say)
    engine = make_engine(executor, config, drafts, remote_drafts(options, model.vocab_size))
    limits = Limits(vocab_size=model.vocab_size, max_model_len=max_model_len,
                    max_kv_tokens=config.num_pages * config.page_size, request=options.request_limits)
    intake = Intake(tokenizer, limits, defaults, chat_template=template,
                    seeds=random.Random(options.seed))  # noqa: S311 (reproducible, not secret)
    if config.grammars:
        intake.start_grammars()
    info = ModelInfo(
        name=options.model, family=loaded.config.family, vocab_size=model.vocab_size, max_model_len=max_model_len,
        dtype=jnp.dtype(dtype).name, num_parameters=num_parameters,
        eos_token_ids=intake.limits.eos_token_ids, has_tokenizer=tokenizer is not None,
        has_chat_template=template is not None)
    core = Core(info, intake, tokenizer, EngineThread(engine, options.max_waiting, options.max_waiting_tokens))
    return Started(core, executor, report)


def choose_implementations(options: Options, folder: Path, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None
                           ) -> tuple[Decoder, list[tuple[str, str]]]:
    """The decoder with its attention, and what serves each operation; before anything is loaded.

    Raises InvalidConfig with every reason, also for a quantization that the folder does not allow.
    """
    config = loading.read_config(folder)
    quantization = loading.served_quantization(folder, options.quantization)
    if quantization is None and options.int8_matmul is not None:
        raise InvalidConfig("int8_matmul", f"{options.int8_matmul!r}, but no weight is int8; set quantization")
    model = make_decoder(config, dtype=dtype, kv_dtype=KV_DTYPES.get(options.kv_cache_dtype),
                         page_size=options.page_size, mesh=mesh, implementation=options.attention)
    max_model_len = choose_max_model_len(options, config.max_position_embeddings)
    sizes = engine_config(options, max_model_len, max(options.max_num_seqs, -(-max_model_len // options.page_size)),
                          smallest_steps(device_of(mesh), WEIGHT_FORMATS[quantization]))
    served = implementations.Served(
        config, dtype, model.kv_dtype, options.page_size, WEIGHT_FORMATS[quantization], options.tensor_parallel_size,
        tuple({*sizes.token_buckets, *sizes.row_buckets}), default_layer_loop(mesh) == "scanned",
        device_of(mesh))
    return model, implementations.chosen(served, model.implementation, options.int8_matmul)


def with_kv_scales(model: Decoder, loaded: loading.LoadedModel, tokenizer: Tokenizer | None,
                   say: Callable[[str], None]) -> Params:
    """The parameters, with the scales that int8 and fp8 pages need: as the model was converted, or measured now."""
    if not is_scaled(model.kv_dtype):
        return loaded.params
    began, ranges = time.monotonic(), loaded.kv_ranges
    if ranges is None:
        ranges = kv_scales.ranges_of_model(loaded.config, loaded.params, tokenizer, dtype=model.dtype, mesh=model.mesh)
        say(f"measured the ranges of keys and values in {time.monotonic() - began:.1f} s")
    return kv_scales.with_scales(loaded.params, model, kv_scales.scales(ranges, model.kv_dtype))


def make_engine(executor: Executor, config: EngineConfig, drafts: DraftLengths | None = None,
                remote: RemoteDrafts | None = None) -> Engine:
    """An engine over warm programs, whose metrics count what it compiles from now on."""
    pool = PagePool(config.num_pages, config.page_size, config.enable_prefix_caching)
    return Engine(executor, Scheduler(config, pool, drafts=drafts), compiles=CompileCounter(), remote=remote)


def measured_drafts(executor: Executor, config: EngineConfig, say: Callable[[str], None]) -> DraftLengths | None:
    """How many tokens are drafted, by what rounds take on this device; None without a drafter."""
    if not config.num_speculative_tokens:
        return None
    seconds, catch_up = executor.measure_rounds(), executor.measure_catch_up()
    say(f"milliseconds of a decode round:\n{draft_lengths.table(seconds, config.num_speculative_tokens)}")
    if catch_up is not None:
        say(f"milliseconds of {catch_up.tokens} tokens that the draft model has to catch up with: "
            f"{catch_up.seconds * 1e3:.2f}")
    return DraftLengths(config.num_speculative_tokens, seconds, catch_up)


def choose_dtype(name: str, folder: Path) -> jnp.dtype:
    """The dtype of weights, activations and pages; "auto" takes the checkpoint's own."""
    if name == "auto":
        name = loading.dtype_of(folder)
    return jnp.dtype(name)


def choose_max_model_len(options: Options, longest: int) -> int:
    """The model's own length, but not beyond what a first try should reserve."""
    if options.max_model_len is None:
        return min(longest, DEFAULT_MAX_MODEL_LEN)
    if not 1 <= options.max_model_len <= longest:
        raise InvalidConfig("max_model_len", f"{options.max_model_len} is not in 1..{longest}, the model's "
                            "max_position_embeddings")
    return options.max_model_len


def read_text_files(options: Options, folder: Path) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and chat template; None for a folder without one (token ids in and out)."""
    source = Path(options.tokenizer).expanduser() if options.tokenizer else folder
    if not options.tokenizer and not (source / "tokenizer.json").is_file():
        return None, None
    tokenizer = Tokenizer.from_folder(source)
    if tokenizer.chat_template is None:
        return tokenizer, None
    try:
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens,
                                bounds=render_bounds(options.request_limits))
        template.start()  # a template that does not compile is an error of the start, not of the first chat
    except ModelFormatError as error:
        raise ModelFormatError(f"{source}: {error}") from error
    return tokenizer, template


def engine_config(options: Options, max_model_len: int, num_pages: int, least: SmallestSteps) -> EngineConfig:
    # One step never computes more than the longest row and a token for every other one can need.
    most_useful = -(-(max_model_len + options.max_num_seqs) // 128) * 128
    budget = min(options.max_num_batched_tokens, most_useful)
    return EngineConfig(
        max_model_len=max_model_len, num_pages=num_pages, page_size=options.page_size,
        max_num_seqs=options.max_num_seqs, max_decode_rounds=options.max_decode_rounds, max_num_batched_tokens=budget,
        num_speculative_tokens=options.num_speculative_tokens if options.drafter else 0,
        token_buckets=least.token_buckets(budget), row_buckets=least.row_buckets(options.max_num_seqs),
        enable_prefix_caching=options.enable_prefix_caching, max_waiting=options.max_waiting, seed=options.seed)


def plan_memory(options: Options, model: Decoder | DraftPair, params: Any, max_model_len: int, grammars: bool
                ) -> memory.MemoryPlan:  # fmt: skip
    """How the memory of the devices that hold `params` is used."""
    device = next(iter(jax.tree.leaves(params)[0].devices()))  # the set is the sharding's own: left whole
    budget = memory.memory_budget(device, options.gpu_memory_utilization, memory.weight_bytes(params))
    return plan_within(budget, options, model, params, max_model_len, on_cpu=device.platform == "cpu",
                       grammars=grammars)


def plan_within(budget: int, options: Options, model: Decoder | DraftPair, params: Any, max_model_len: int, *,
                on_cpu: bool, grammars: bool = False) -> memory.MemoryPlan:
    """Weights are counted, temporaries measured from programs compiled with few pages, pages get the rest.

    On a CPU temporaries are not measured: there the budget is a small share of the memory.

    budget: bytes on each device. params: arrays, or shapes with their shardings. grammars: whether rows may have one.
    """
    full_row = -(-max_model_len // options.page_size)
    needed = max(options.max_num_seqs, full_row)
    shards, cache = sharding.tensor_parallel_size(model.mesh), model.cache(1, options.page_size)
    plan = partial(
        memory.plan_pages, budget=budget, weights=memory.weight_bytes(params),
        bytes_per_page=cache.bytes_per_page // shards, page_size=options.page_size,
        rows=row_bytes(model, options.max_num_seqs, full_row) + getattr(cache, "fixed_bytes", 0),
        needed=needed, most=options.max_num_seqs * full_row if on_cpu else None, wanted=options.num_pages,
        on_cpu=on_cpu)
    without_temporaries = plan(temporaries=None)  # what cannot fit is refused before anything is compiled
    if on_cpu:
        return without_temporaries
    config = replace(engine_config(options, max_model_len, needed, SmallestSteps()), grammars=grammars)
    return plan(temporaries=memory.measure_temporaries(lambda: compile_largest(model, params, config)))


def compile_largest(model: Decoder | DraftPair, params: Any, config: EngineConfig
                    ) -> list[tuple[jax.stages.Compiled, int]]:  # fmt: skip
    """The programs with the most temporaries, and what each is handed (`programs.Program`)."""
    declared = programs.declare(abstract_signature(model, params, config))
    return [(declared[key].compile(), declared[key].handed) for key in programs.largest(declared)]


def row_struct(model: Decoder | DraftPair, max_num_seqs: int, max_pages_per_row: int) -> Any:
    """Shapes of `row_state.empty`."""
    return jax.eval_shape(partial(row_state.empty, max_num_seqs, max_pages_per_row, model.vocab_size,
                                  sharding.replicated(model.mesh)))  # fmt: skip


def row_bytes(model: Decoder | DraftPair, max_num_seqs: int, max_pages_per_row: int) -> int:
    """Of the row state, on every device: mostly what token rules need of each id."""
    leaves = jax.tree.leaves(row_struct(model, max_num_seqs, max_pages_per_row))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def abstract_signature(model: Decoder | DraftPair, params: Any, config: EngineConfig) -> programs.Signature:
    """The signature of an engine whose pages and row state are shapes only: for compiling before they exist.

    params: arrays, or the shapes of `params.abstract_params`.
    """
    everywhere = sharding.replicated(model.mesh)
    rows = jax.tree.map(partial(programs.placed_struct, everywhere),
                        row_struct(model, config.max_num_seqs, config.max_pages_per_row))
    state = steps.DeviceState(model.cache(config.num_pages, config.page_size).struct(), rows)
    return programs.Signature(model, params, state, Batcher(config, has_plain_programs(model)), everywhere)


def warm_up(executor: Executor, show_progress: bool) -> int:
    """Compiles everything, with a bar on a terminal once it takes long enough to be noticed."""
    total = executor.num_declared
    with tqdm(total=total, desc="compiling", unit="program", delay=1.0, leave=False,
              disable=None if show_progress else True) as bar:
        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        return executor.warm_up(workers=min(8, os.cpu_count() or 1), progress=progress)


def count_params(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> int:
    """Parameters of the model as placed (repeated kv heads count, the scales of quantised weights do not)."""
    specs = param_specs(config, tensor_parallel=sharding.tensor_parallel_size(mesh))
    return sum(math.prod(spec.shape) for _, spec in flatten_specs(specs))
