"""Writes tiny random models whose ids are letters: a target, a draft model and heads that are often right about it."""

import json
from pathlib import Path

import numpy as np
import tiny_model
from features import EOS, FIRST, LETTERS
from safetensors.numpy import save_file

from checkpoints import heads

VOCAB, WIDTH, NUM_HEADS = EOS + 1, tiny_model.WIDTH, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu",
    "hidden_size": WIDTH, "intermediate_size": tiny_model.FFN, "num_hidden_layers": 1,
    "num_attention_heads": tiny_model.HEADS, "num_key_value_heads": tiny_model.KV_HEADS,
    "head_dim": tiny_model.HEAD_DIM, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": EOS}  # fmt: skip


def weights(share: float) -> dict[str, np.ndarray]:
    """share: of what the layer adds; without it the last token alone says what comes next."""
    found = {name: tensor for name, tensor in tiny_model.tensors(VOCAB).items() if "layers.1." not in name}
    found["lm_head.weight"] = np.random.default_rng(1).normal(size=(VOCAB, WIDTH)).astype(np.float32) * 0.4
    return {name: tensor * np.float32(share) if "o_proj" in name or "down_proj" in name else tensor
            for name, tensor in found.items()}  # fmt: skip


def following(paired: bool) -> list[int]:
    """The likeliest id behind each, as a model without its layer has it. paired: of FIRST and of SECOND by turns."""
    found = weights(0.0)
    logits = found["model.embed_tokens.weight"] @ found["lm_head.weight"].T
    if paired:
        is_first = np.array([*(letter in FIRST for letter in LETTERS), False])
        logits[is_first[:, None] == is_first] = -np.inf
    return logits.argmax(1).tolist()


def write_model(folder: Path, share: float, tokenizer: str | None = None) -> str:
    """tokenizer: text of tokenizer.json. Returns the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    save_file(weights(share), folder / "model.safetensors")
    return str(folder)


def write_heads(folder: Path) -> str:
    """Each head goes on from the embedding of the token before, whatever the state. Returns the folder."""
    folder.mkdir()
    norm = np.ones(WIDTH, np.float32)
    config = {"model_type": "sequential_medusa", "num_heads": NUM_HEADS, "num_blocks": 1, "hidden_size": WIDTH,
              "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "target_final_norm_sha256": heads.fingerprint(norm)}
    (folder / "config.json").write_text(json.dumps(config))
    found = {}
    for index in range(NUM_HEADS):
        name = f"heads.{index}."
        found |= {
            f"{name}state_norm.weight": norm, f"{name}token_norm.weight": norm,
            f"{name}input.weight": np.concatenate([np.zeros((WIDTH, WIDTH)), np.eye(WIDTH)], 1).astype(np.float32),
            f"{name}blocks.0.weight": np.zeros((WIDTH, WIDTH), np.float32),
            f"{name}blocks.0.bias": np.zeros(WIDTH, np.float32)}  # fmt: skip
    save_file(found, folder / "model.safetensors")
    return str(folder)
