"""Compiles the speculative programs of a small pair for devices that are not here, in a process of its own."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxinfer import programs, sharding, startup
from jaxinfer.config import EngineConfig, ModelConfig, RopeConfig
from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.medusa_drafter import DecoderHeads, MedusaDrafter
from jaxinfer.models import make_decoder
from jaxinfer.models.medusa import HeadsConfig, head_specs
from jaxinfer.params import abstract_params, default_layer_loop, is_spec
from jaxinfer.prompt_lookup import PromptLookup
from jaxinfer.remote_drafts import num_ahead
from jaxinfer.remote_proposals import RemoteProposals
from pallas_kernels.aot.targets import target

DRAFTED, ROWS = 4, 16
LONG = 2**20
"""Tokens of a row of prompt lookup: a history that would be seen if it were copied."""
ENGINE = EngineConfig(
    max_model_len=2048, num_pages=2048, page_size=16, max_num_seqs=ROWS, max_num_batched_tokens=256,
    num_speculative_tokens=DRAFTED, grammars=True, token_buckets=(256,), row_buckets=(ROWS,))  # fmt: skip
# Whatever leaves the device or waits for the host in HLO.
HOST = re.compile(r"\b(infeed|outfeed|send|recv)\(|callback|S\(5\)")


def config(layers: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_layers=layers, num_heads=8,
        num_kv_heads=2, head_dim=128, max_position_embeddings=2048, rms_norm_eps=1e-5, rope=RopeConfig(),
        windows=(0,) * layers)  # fmt: skip


def compile_all(where: str, kind: str, names: list[str]) -> list[dict[str, Any]]:
    """The job: of each program its name, bytes that are aliased, of what it is given to write into, of temporaries and
    of pages (or of the drafter's tokens), and what it exchanges with the host.

    kind: "draft_model", "ngram", "medusa" or "remote". names: of programs.
    """
    devices = target(where)
    mesh = Mesh(np.array(devices.devices()).reshape(1, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    signature = startup.abstract_signature(*pair_of(kind, mesh), ENGINE)
    drafter, pages = signature.state.kv_pages.draft, signature.state.kv_pages
    largest = max(map(size_of, jax.tree.leaves(drafter if kind in ("draft_model", "ngram") else pages.target)))
    with jax.set_mesh(mesh):
        declared = {program.name: program for program in programs.declare(signature).values()}
        return [figures(declared[name]) | {"pages": largest} for name in names]


def pair_of(kind: str, mesh: Mesh) -> tuple[DraftPair, Pair]:
    """A target with this drafter, and the shapes of their parameters."""
    shapes = [config(layers) for layers in (4, 2)]
    model, draft = (make_decoder(each, dtype=jnp.bfloat16, page_size=16, mesh=mesh) for each in shapes)
    weights, own = (abstract_params(each, mesh=mesh, layer_loop=default_layer_loop(mesh)) for each in shapes)
    if kind == "draft_model":
        return DraftPair(model, DraftModel(draft, DRAFTED)), Pair(weights, own)
    if kind == "medusa":
        width = shapes[0].hidden_size
        heads = HeadsConfig(DRAFTED, 1, width, shapes[0].vocab_size, 1e-5, "")
        drafter = MedusaDrafter(model, DecoderHeads(heads, model), DRAFTED, ROWS, width, jnp.bfloat16, mesh)
        return DraftPair(model, drafter), Pair(weights, abstract_heads(heads, mesh))
    if kind == "remote":
        return DraftPair(model, RemoteProposals(DRAFTED, num_ahead(DRAFTED), ROWS, mesh)), Pair(weights, ())
    return DraftPair(model, PromptLookup(DRAFTED, ROWS, LONG, mesh)), Pair(weights, ())


def abstract_heads(heads: HeadsConfig, mesh: Mesh) -> Any:
    place = sharding.replicated(mesh)
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place),
                        head_specs(heads, jnp.bfloat16), is_leaf=is_spec)  # fmt: skip


def size_of(leaf: Any) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize


def figures(program: programs.Program) -> dict[str, Any]:
    compiled = program.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    given = [leaf for index in program.donate for leaf in jax.tree.leaves(program.arguments[index])]
    return {"name": program.name, "aliased": memory.alias_size_in_bytes, "state": sum(map(size_of, given)),
            "temporaries": memory.temp_size_in_bytes,
            "host": sorted({match[0] for match in HOST.finditer(text)})}  # fmt: skip
