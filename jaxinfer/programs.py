"""The declared set of compiled programs: everything that runs while serving, compiled before ready."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import speculative_step, steps
from jaxinfer.batch import Batcher
from jaxinfer.errors import CompileFailed
from jaxinfer.fault_points import fault_point
from jaxinfer.layout import DecodeLayout, PrefillLayout, RulesLayout, SpeculateLayout
from jaxinfer.model import Model
from jaxinfer.types import SamplerForm, mask_width

EXTRA_PAGES = 256
"""Page-table entries one `append_pages` call enters."""

MAX_REASON = 300
"""Characters of a compiler's own words in an error."""

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """One unit to compile: a name to show, the function, the shapes of its arguments. handed: bytes among them that
    another program made and that are neither weights nor state, where they matter.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    compiler_options: dict[str, Any] | None = None
    handed: int = 0

    def lower(self) -> jax.stages.Lowered:
        jitted = jax.jit(self.function, donate_argnums=self.donate, out_shardings=self.out_shardings,
                         compiler_options=self.compiler_options)
        return jitted.lower(*self.arguments)

    def compile(self) -> jax.stages.Compiled:
        return self.lower().compile()


@dataclass(frozen=True)
class Signature:
    """What all programs of an engine share: the model and the shapes and placement of its state."""

    model: Model
    params: Any
    state: steps.DeviceState
    batcher: Batcher
    replicated: Any

    def host_array(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.replicated)


def prefill_key(layout: PrefillLayout) -> Key:
    return ("prefill", layout.num_tokens)


def decode_key(layout: DecodeLayout | SpeculateLayout, form: SamplerForm) -> Key:
    return ("speculate" if isinstance(layout, SpeculateLayout) else "decode", layout.num_rows, form)


APPEND, RULES, SCORE, LOGITS = ("append_pages",), ("enter_rules",), ("score",), ("logits",)
SAMPLE, SAMPLE_LEGAL = ("sample",), ("sample_legal",)
CATCH_UP, PROPOSALS = ("catch up",), ("proposals",)


def declare(signature: Signature) -> dict[Key, Program]:
    """Every program the engine may call, largest first so that a parallel compile ends evenly."""
    declared = [*_prefill(signature), *_decode(signature), *_after_prefill(signature), _append(signature),
                _rules(signature), *_catch_up(signature), *_proposals(signature), *_with_grammars(signature)]
    options = compiler_options(signature)
    return {key: replace(program, compiler_options=options) for key, program in declared}


def largest(declared: Mapping[Key, Program]) -> list[Key]:
    """Those with the most temporaries: the largest prefill, the largest decode with the full sampler, what samples,
    scores and gives logits behind prefill, and what verifies proposals under masks.
    """
    prefill = next(key for key in declared if key[0] == "prefill")
    decode = next(key for key in declared if key[0] in ("speculate", "decode") and key[2] is SamplerForm.FULL)
    verify = [key for key in declared if key[0] == "verify"]
    return [prefill, decode, SAMPLE, SCORE, LOGITS, *verify[:1]]


def compiler_options(signature: Signature) -> dict[str, Any] | None:
    """What the devices' compiler has to be told so that it neither copies weights nor computes products twice.

    On tpu7x XLA wants bfloat16 operands of matmuls in tiles of 16 x 128, arguments come in tiles of 8 x 128, and what
    a loop uses is turned before the loop: 15 GB of temporaries in a decode step of an 8B model, in the scanned and in
    the unrolled form (libtpu 0.0.48; 2 MB with this option).

    On GPUs XLA computes products again where it believes memory to be short, and it counts pages that kernels write in
    place once for every kernel: 356 GB for a step of an 8B model that takes 135 GB (jaxlib 0.11.2). It then computed
    half of the layers' products and the head twice. What a program takes is measured before there are pages.
    """
    (device, *_) = signature.replicated.device_set
    if device.device_kind.startswith("TPU7x"):
        return {"xla_tpu_control_large_2nd_minor_layout_for_x16": 0}
    if device.platform in ("gpu", "cuda"):
        return {"xla_disable_hlo_passes": "rematerialization"}
    return None


def _placements(signature: Signature) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, signature.state)


def _prefill(signature: Signature) -> Iterator[tuple[Key, Program]]:
    everywhere, step = signature.replicated, prefill_function(signature)
    for layout in reversed(signature.batcher.prefill):
        yield prefill_key(layout), Program(
            f"prefill {layout.num_tokens} tokens", partial(step, signature.model, layout),
            (signature.params, signature.state, signature.host_array(layout.size)), donate=(1,),
            out_shardings=(_placements(signature), everywhere, everywhere))


def prefill_function(signature: Signature) -> Callable[..., Any]:
    speculates = signature.batcher.config.num_speculative_tokens > 0
    return speculative_step.prefill_step if speculates else steps.prefill_step


def _decode(signature: Signature) -> Iterator[tuple[Key, Program]]:
    """Those that speculate first: they are larger."""
    yield from _decode_steps(signature, signature.batcher.decode)
    if signature.batcher.plain:
        yield from _decode_steps(of_target(signature), signature.batcher.plain)


def of_target(signature: Signature) -> Signature:
    """Of a pair's target alone, with the same rows."""
    pair: Any = signature.model
    return replace(signature, model=pair.target, params=signature.params.target,
                   state=signature.state._replace(kv_pages=signature.state.kv_pages.target))


def _decode_steps(signature: Signature, layouts: Sequence[DecodeLayout | SpeculateLayout]
                  ) -> Iterator[tuple[Key, Program]]:
    for layout in reversed(layouts):
        speculates = isinstance(layout, SpeculateLayout)
        step: Any = speculative_step.speculate_step if speculates else steps.decode_step
        for form in SamplerForm:
            yield decode_key(layout, form), Program(
                f"{'speculate' if speculates else 'decode'} {layout.num_rows} rows, {form.name.lower()} sampler",
                partial(step, signature.model, layout, form),
                (signature.params, signature.state, signature.host_array(layout.size)), donate=(1,),
                out_shardings=(_placements(signature), signature.replicated))


def propose_key(layout: SpeculateLayout) -> Key:
    return ("propose", layout.num_rows)


def verify_key(layout: SpeculateLayout) -> Key:
    return ("verify", layout.num_rows)


def _with_grammars(signature: Signature) -> Iterator[tuple[Key, Program]]:
    """A speculative round in two, between which the host asks the rows' grammars."""
    if not signature.batcher.config.grammars:
        return
    pair: Any = signature.model
    placed, everywhere, width = _placements(signature), signature.replicated, mask_width(pair.vocab_size)
    for layout in reversed(signature.batcher.speculate):
        inputs, propose = signature.host_array(layout.size), partial(speculative_step.propose_step, pair, layout)
        yield propose_key(layout), Program(
            f"propose {layout.num_rows} rows", propose, (signature.params, signature.state, inputs), donate=(1,),
            out_shardings=(placed, everywhere))
        _, drafted = jax.eval_shape(propose, signature.params, signature.state, inputs)
        drafted = jax.tree.map(partial(placed_struct, everywhere), drafted)
        masks = signature.host_array(layout.num_rows, layout.num_drafted + 1, width)
        yield verify_key(layout), Program(
            f"verify {layout.num_rows} rows by grammars", partial(speculative_step.verify_step, pair, layout),
            (signature.params, signature.state, inputs, drafted, masks), donate=(1,),
            out_shardings=(placed, everywhere),
            handed=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(drafted)))


def placed_struct(sharding: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _after_prefill(signature: Signature) -> Iterator[tuple[Key, Program]]:
    unsampled, hidden = prefill_results(signature)
    yield SAMPLE, Program("sample after prefill", partial(steps.sample_step, signature.model),
                          (signature.params, signature.state.rows, unsampled), donate=(1,),
                          out_shardings=(_placements(signature).rows, signature.replicated))
    if signature.batcher.config.grammars:
        masks = signature.host_array(unsampled.slots.shape[0], mask_width(signature.model.vocab_size))
        yield SAMPLE_LEGAL, Program("sample by grammars", partial(steps.sample_step, signature.model),
                                    (signature.params, signature.state.rows, unsampled, masks), donate=(1,),
                                    out_shardings=(_placements(signature).rows, signature.replicated))
    start = signature.host_array()
    chunk = min(steps.SCORE_CHUNK, hidden.shape[0])
    yield SCORE, Program("score prompts", partial(steps.score_chunk, signature.model),
                         (signature.params, hidden, start, signature.host_array(chunk)),
                         out_shardings=signature.replicated)
    yield LOGITS, Program("logits", partial(steps.logits_chunk, signature.model, chunk),
                          (signature.params, hidden, start), out_shardings=signature.replicated)


def prefill_results(signature: Signature) -> tuple[Any, Any]:
    """Shapes of what the largest prefill returns beside the state: `steps.Unsampled` and hidden states [T, D]."""
    layout = signature.batcher.prefill[-1]
    prefill = partial(prefill_function(signature), signature.model, layout)
    _, *results = jax.eval_shape(prefill, signature.params, signature.state, signature.host_array(layout.size))
    unsampled, hidden = jax.tree.map(partial(placed_struct, signature.replicated), results)
    return unsampled, hidden


def _append(signature: Signature) -> tuple[Key, Program]:
    return APPEND, Program("append pages", steps.append_pages,
                           (signature.state, signature.host_array(EXTRA_PAGES, 3)), donate=(0,),
                           out_shardings=_placements(signature))


def _rules(signature: Signature) -> tuple[Key, Program]:
    layout = RulesLayout(signature.model.vocab_size)
    return RULES, Program("enter token rules", partial(steps.enter_rules, layout),
                          (signature.state.rows, signature.host_array(layout.size)), donate=(0,),
                          out_shardings=_placements(signature).rows)


def _catch_up(signature: Signature) -> Iterator[tuple[Key, Program]]:
    pair: Any = signature.model
    config = signature.batcher.config
    if config.num_speculative_tokens and pair.drafter.num_caught_up:
        told = signature.host_array(2 + pair.drafter.num_caught_up + config.max_pages_per_row)
        yield CATCH_UP, Program("catch up with a row", partial(speculative_step.catch_up, pair),
                                (signature.params, signature.state, told), donate=(1,),
                                out_shardings=_placements(signature))


def _proposals(signature: Signature) -> Iterator[tuple[Key, Program]]:
    pair: Any = signature.model
    config = signature.batcher.config
    if config.num_speculative_tokens and pair.drafter.num_entered:
        layout = pair.proposal_layout
        table = signature.host_array(config.max_num_seqs, layout.size)
        yield PROPOSALS, Program("proposals from outside", partial(speculative_step.enter_proposals, pair, layout),
                                 (signature.state, table), donate=(0,), out_shardings=_placements(signature))


def compile_all(programs: dict[Key, Program], workers: int, progress: Callable[[str], None]
                ) -> dict[Key, jax.stages.Compiled]:
    """All programs: traced and lowered here, one after the other, as that is Python; compiled or loaded from the
    compile cache by `workers` threads, as XLA releases the interpreter. `progress` hears the name of each when done.
    Raises CompileFailed.
    """
    def finish(program: Program, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        try:
            fault_point("compile", program.name)
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise CompileFailed(f"the program {program.name!r} could not be compiled: {shortened(str(error))}; if it "
                                "is for lack of memory, lower gpu_memory_utilization, max_num_seqs or "
                                "max_num_batched_tokens; the memory plan is shown above") from error
        progress(program.name)
        return compiled

    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool, no_garbage_collection():
        compiling = {key: pool.submit(finish, program, program.lower()) for key, program in programs.items()}
        return {key: future.result() for key, future in compiling.items()}


def shortened(text: str) -> str:
    """The compiler's reason, without the pages that may follow it."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} .."


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of objects that live on: collections in between cost a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
