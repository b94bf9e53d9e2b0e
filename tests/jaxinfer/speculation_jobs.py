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
from jaxinfer.models import make_decoder
from jaxinfer.params import abstract_params, default_layer_loop
from jaxinfer.prompt_lookup import PromptLookup
from pallas_kernels.aot.targets import target

DRAFTED = 4
LONG = 2**20
"""Tokens of a row of prompt lookup: a history that would be seen if it were copied."""
ENGINE = EngineConfig(
    max_model_len=2048, num_pages=2048, page_size=16, max_num_seqs=16, max_num_batched_tokens=256,
    num_speculative_tokens=DRAFTED, token_buckets=(256,), row_buckets=(16,))  # fmt: skip
# Whatever leaves the device or waits for the host in HLO.
HOST = re.compile(r"\b(infeed|outfeed|send|recv)\(|callback|S\(5\)")


def config(layers: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_layers=layers, num_heads=8,
        num_kv_heads=2, head_dim=128, max_position_embeddings=2048, rms_norm_eps=1e-5, rope=RopeConfig(),
        windows=(0,) * layers)  # fmt: skip


def compile_all(where: str, kind: str, forms: list[str]) -> list[dict[str, Any]]:
    """The job: of each speculative program its name, bytes that are aliased, of the state, of temporaries and of the
    drafter's pages or tokens, and what it exchanges with the host.

    kind: "draft_model" or "ngram". forms: samplers.
    """
    devices = target(where)
    mesh = Mesh(np.array(devices.devices()).reshape(1, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    shapes = [config(layers) for layers in (4, 2)]
    target_model, draft = (make_decoder(each, dtype=jnp.bfloat16, page_size=16, mesh=mesh) for each in shapes)
    weights, own = (abstract_params(each, mesh=mesh, layer_loop=default_layer_loop(mesh)) for each in shapes)
    if kind == "draft_model":
        pair, params = DraftPair(target_model, DraftModel(draft, DRAFTED)), Pair(weights, own)
    else:
        pair, params = DraftPair(target_model, PromptLookup(DRAFTED, 16, LONG, mesh)), Pair(weights, ())
    signature = startup.abstract_signature(pair, params, ENGINE)
    state = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(signature.state))
    (largest, *_) = sorted(jax.tree.leaves(signature.state.kv_pages.draft), key=lambda leaf: -leaf.size)
    pages = np.prod(largest.shape) * largest.dtype.itemsize
    found = []
    with jax.set_mesh(mesh):
        for key, program in programs.declare(signature).items():
            if key[0] != "decode" or key[2].name.lower() not in forms:
                continue
            compiled = program.compile()
            memory, text = compiled.memory_analysis(), compiled.as_text() or ""
            found.append({"name": program.name, "aliased": memory.alias_size_in_bytes, "state": int(state),
                          "temporaries": memory.temp_size_in_bytes, "pages": int(pages),
                          "host": sorted({match[0] for match in HOST.finditer(text)})})  # fmt: skip
    return found
