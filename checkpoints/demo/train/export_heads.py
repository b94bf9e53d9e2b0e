"""The heads' folder: writing it and reading it back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from checkpoints.demo.train.config import HeadsConfig, ModelConfig
from checkpoints.demo.train.export import write_json
from checkpoints.demo.train.model import Params
from checkpoints.heads import MODEL_TYPE, fingerprint


def settings(config: HeadsConfig, target: Params, target_config: ModelConfig, name: str) -> dict:
    """Return config.json of heads for the target called `name`."""
    return {
        "model_type": MODEL_TYPE,
        "num_heads": config.heads,
        "num_blocks": config.blocks,
        "hidden_size": target_config.hidden,
        "vocab_size": target_config.vocabulary,
        "rms_norm_eps": target_config.norm_eps,
        "dtype": "bfloat16",
        "target": name,
        "target_final_norm_sha256": fingerprint(np.asarray(target["norm"])),
    }


def tensors(params: Params) -> dict[str, np.ndarray]:
    """Return the weights by name, bfloat16, matrices turned to [out, in]."""
    named = {}
    for index, head in enumerate(params["heads"]):
        prefix = f"heads.{index}."
        named[prefix + "state_norm.weight"] = head["state_norm"]
        named[prefix + "token_norm.weight"] = head["token_norm"]
        named[prefix + "input.weight"] = head["input_proj"].T
        for number, block in enumerate(head["blocks"]):
            named[f"{prefix}blocks.{number}.weight"] = block["block_proj"].T
            named[f"{prefix}blocks.{number}.bias"] = block["bias"]
    return {name: np.ascontiguousarray(array, dtype=jnp.bfloat16) for name, array in named.items()}


def write(folder: Path, params: Params, config: dict) -> None:
    """Write the folder but its record; `config` is that of `settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    (folder / "model.safetensors").write_bytes(save(tensors(params), metadata={"format": "pt"}))


def read(folder: Path) -> Params:
    """Read heads back as float32 weights [in, out]."""
    config = json.loads((folder / "config.json").read_text())
    stored = {name: x.astype(np.float32) for name, x in load_file(folder / "model.safetensors").items()}

    def block(prefix: str) -> Params:
        return {"block_proj": stored[f"{prefix}.weight"].T, "bias": stored[f"{prefix}.bias"]}

    def head(prefix: str) -> Params:
        return {
            "state_norm": stored[f"{prefix}.state_norm.weight"],
            "token_norm": stored[f"{prefix}.token_norm.weight"],
            "input_proj": stored[f"{prefix}.input.weight"].T,
            "blocks": [block(f"{prefix}.blocks.{number}") for number in range(config["num_blocks"])],
        }

    return jax.tree.map(jnp.asarray, {"heads": [head(f"heads.{index}") for index in range(config["num_heads"])]})
