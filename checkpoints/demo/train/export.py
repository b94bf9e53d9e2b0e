"""Checkpoints in the Hugging Face layout: writing the trained weights, and reading them back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer

from checkpoints.demo.train import bpe
from checkpoints.demo.train.bpe import END_OF_TEXT_ID
from checkpoints.demo.train.config import ModelConfig
from checkpoints.demo.train.model import Params

MAX_POSITIONS = 4096
MODULES = {
    "input_layernorm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def settings(config: ModelConfig) -> dict:
    """Return config.json of a model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT_ID,
        "dtype": "bfloat16",
        "eos_token_id": END_OF_TEXT_ID,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocabulary,
    }


def tensors(params: Params) -> dict[str, np.ndarray]:
    """Return the weights under their Hugging Face names, bfloat16, matrices of the layers turned to [out, in]."""
    named = {"model.embed_tokens.weight": params["embed_tokens"], "model.norm.weight": params["norm"]}
    for index, layer in enumerate(params["layers"]):
        for name, module in MODULES.items():
            named[f"model.layers.{index}.{module}.weight"] = layer[name].T
    return {name: np.ascontiguousarray(array, dtype=jnp.bfloat16) for name, array in named.items()}


def write(folder: Path, params: Params, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write all the files of a checkpoint but its record."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", settings(config))
    write_json(folder / "generation_config.json", {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID})
    (folder / "model.safetensors").write_bytes(save(tensors(params), metadata={"format": "pt"}))
    bpe.save(tokenizer, folder, MAX_POSITIONS)


def write_json(file: Path, content: dict) -> None:
    """Write `content` for people to read."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def read(folder: Path) -> tuple[Params, ModelConfig]:
    """Read a checkpoint of this layout back as float32 weights [in, out] and their shape."""
    found = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        hidden=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        kv_heads=found["num_key_value_heads"],
        intermediate=found["intermediate_size"],
        head_dim=found["head_dim"],
        vocabulary=found["vocab_size"],
        rope_theta=found["rope_theta"],
        norm_eps=found["rms_norm_eps"],
    )
    stored = {name: x.astype(np.float32) for name, x in load_file(folder / "model.safetensors").items()}
    layers = [
        {name: stored[f"model.layers.{index}.{module}.weight"].T for name, module in MODULES.items()}
        for index in range(config.layers)
    ]
    embed, norm = stored["model.embed_tokens.weight"], stored["model.norm.weight"]
    return jax.tree.map(jnp.asarray, {"embed_tokens": embed, "layers": layers, "norm": norm}), config
