"""Writes a tiny random Llama folder with the demo's tokenizer: real text through a model that compiles in seconds."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 32, 2, 4, 2, 16, 48


def write_tiny_model(folder: Path, source: Path, with_tokenizer: bool = True) -> Path:
    """A float32 model of two layers in `folder`; `source` is the demo target's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "dtype": "float32",
               "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": FFN,
               "max_position_embeddings": 512}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    if with_tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copy(source / name, folder / name)
    save_file(tensors(config["vocab_size"]), folder / "model.safetensors")
    return folder


def tensors(vocab_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * 2.0 / np.sqrt(shape[-1])).astype(np.float32)

    found = {"model.embed_tokens.weight": normal(vocab_size, WIDTH), "model.norm.weight": np.ones(WIDTH, np.float32)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = normal(heads * HEAD_DIM, WIDTH)
        found[f"{prefix}self_attn.o_proj.weight"] = normal(WIDTH, HEADS * HEAD_DIM)
        found[f"{prefix}mlp.gate_proj.weight"] = normal(FFN, WIDTH)
        found[f"{prefix}mlp.up_proj.weight"] = normal(FFN, WIDTH)
        found[f"{prefix}mlp.down_proj.weight"] = normal(WIDTH, FFN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = np.ones(WIDTH, np.float32)
    return found
