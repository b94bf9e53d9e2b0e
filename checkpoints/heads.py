"""Folders with heads that a model drafts for itself with: their config.json, their tensors, the target they belong to.

Tensors are named as in the tree: "heads/0/input/weight" is "heads.0.input.weight" in the file, matrices [out, in].
"""

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.config_reader import CONFIG_FILE, integer, number, read_raw_config
from checkpoints.errors import CheckpointError
from checkpoints.safetensors_reader import open_safetensors
from checkpoints.tensors import LazyTensor, transposed

MODEL_TYPE = "sequential_medusa"
MAX_HEADS, MAX_BLOCKS, MAX_SIZE = 64, 64, 2**24


def read_heads_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of heads: num_heads, num_blocks, hidden_size, vocab_size, rms_norm_eps, target_fingerprint (of
    `fingerprint`).

    Raises CheckpointError naming the key, its value and what was expected.
    """
    raw, source = read_raw_config(folder), Path(folder) / CONFIG_FILE
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(source, f"model_type must be {MODEL_TYPE!r}, got {raw.get('model_type')!r}: this folder "
                              "does not hold heads for a target's hidden state")  # fmt: skip
    named = raw.get("target_final_norm_sha256")
    if not isinstance(named, str):
        raise CheckpointError(source, f"target_final_norm_sha256 must be a string, got {named!r}")
    limits = {"num_heads": MAX_HEADS, "num_blocks": MAX_BLOCKS, "hidden_size": MAX_SIZE, "vocab_size": MAX_SIZE}
    sizes = {key: integer(raw, key, source, limit) for key, limit in limits.items()}
    return sizes | {"rms_norm_eps": number(raw, "rms_norm_eps", source, 0.0, 1.0), "target_fingerprint": named}


def open_heads(folder: str | Path) -> dict[str, LazyTensor]:
    """The tensors by their paths in the tree, matrices turned to [in, out]. Nothing is read. Raises CheckpointError."""
    found = open_safetensors(folder)
    return {
        path_of(name): transposed(tensor) if len(tensor.shape) == 2 else tensor
        for name, tensor in found.items()
    }


def path_of(name: str) -> str:
    """Where a tensor of the file belongs in the tree."""
    return name.replace(".", "/")


def name_of(path: str) -> str:
    """The tensor of the file at a path of the tree."""
    return path.replace("/", ".")


def fingerprint(final_norm: np.ndarray) -> str:
    """SHA-256 of a target's final norm [D] in bfloat16, little-endian: it tells trained models apart by 2 D bytes, in
    whatever form and precision the rest of their weights is stored.
    """
    return hashlib.sha256(final_norm.astype(ml_dtypes.bfloat16).view(np.uint16).astype("<u2").tobytes()).hexdigest()
