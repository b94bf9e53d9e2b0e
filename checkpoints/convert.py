"""Converts a safetensors folder into our own form, with its config and tokenizer files beside it."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import orbax_store
from checkpoints.config_reader import CONFIG_FILE, GENERATION_FILE, read_config
from checkpoints.errors import CheckpointError
from checkpoints.families import FAMILIES
from checkpoints.rules import map_tensors
from checkpoints.safetensors_reader import open_safetensors
from checkpoints.tensors import LazyTensor, cast

COPIED_FILES = (
    CONFIG_FILE,
    GENERATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

LOOK_SECONDS, QUIET_LOOKS, MOST_LOOKS = 0.1, 10, 100
"""At what a failed conversion leaves: it is removed when it was gone in so many looks one after the other."""

type Quantize = Callable[[str, LazyTensor], Mapping[str, np.ndarray] | None]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Any = None,
    quantization: str | None = None,
    quantize: Quantize | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Reads the model folder `source` and writes it to `target`, which must not exist.

    Everything is written beside `target` first and renamed at the end, so a target that exists is whole. Weights are
    mapped from the file tensor by tensor; only what `dtype` or `quantize` change is copied.

    Args:
      dtype: of the result; None keeps the file's.
      quantization: the name of what `quantize` does, kept in the manifest.
      quantize: from a path of the tree and its tensor to the arrays stored instead, by path; None leaves the tensor.
      extra: arrays stored beside the weights, by path.

    Raises CheckpointError, or OSError when the disk does not take it: then nothing is left of it.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise CheckpointError(target, "exists already; choose another folder or remove it")
    if orbax_store.is_store(source):
        raise CheckpointError(source, "is converted already; name the folder it was converted from")
    config = read_config(source)
    tree = map_tensors(open_safetensors(source), FAMILIES[config["family"]], config, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        for name in COPIED_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        arrays: dict[str, np.ndarray] = dict(extra or {})
        for path, tensor in tree.items():
            changed = None if quantize is None else quantize(path, tensor)
            arrays |= changed or {path: (tensor if dtype is None else cast(tensor, dtype))[...]}
        check_room(target.parent, sum(array.nbytes for array in arrays.values()))
        orbax_store.save(partial, arrays, quantization=quantization)
        partial.chmod(0o755)  # mkdtemp's 0700 would hide the model from a server's own user
        partial.rename(target)
    except BaseException:
        remove(partial)
        raise


def remove(folder: Path) -> None:
    """Removes it with all that is in it, and again while threads of a write that failed put it there once more."""
    looks = 0
    for _ in range(MOST_LOOKS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(LOOK_SECONDS)
        looks = 0 if folder.exists() else looks + 1
        if looks == QUIET_LOOKS:
            return


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError where the disk cannot take so much: better now than behind half of it. Orbax packs the arrays, so
    it is the most that they may need.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(f"{folder}: the model may need {num_bytes / 1e9:.3f} GB and {free / 1e9:.3f} GB are free; make "
                      "room or choose another folder")
