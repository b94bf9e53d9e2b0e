"""Reads safetensors checkpoints, single or sharded, without trusting them.

Format: u64 little-endian length n, n bytes of JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then
the data, which the tensors cover without gap or overlap (https://huggingface.co/docs/safetensors, "Format"). Files
are memory-mapped: a box of a tensor touches only its own pages.
"""

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.tensors import LazyTensor, from_array

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own implementation."""
MAX_TENSORS_PER_FILE = 100_000
"""A million empty tensors are valid, and cost a naive reader a gigabyte."""
MAX_INDEX_BYTES = 100_000_000
MAX_DIMENSIONS = 8
LFS_MARK = b"version https://git-lfs"
"""How every git-LFS pointer begins (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
PAGE_MARKS = (b"<!doctype", b"<html", b"<head", b"<?xml")
HEAD_BYTES = 256
"""Of a file, looked at to recognise what else it may be; pages may begin with blank lines."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_safetensors(folder: str | Path) -> dict[str, LazyTensor]:
    """Every tensor of a folder by name; headers are checked, no data is read.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).exists():
        return open_sharded(folder)
    if not (folder / SINGLE_FILE).exists():
        raise CheckpointError(folder, f"has neither {SINGLE_FILE} nor {INDEX_FILE}")
    return open_file(inside(folder, SINGLE_FILE, folder / SINGLE_FILE))


def open_sharded(folder: Path) -> dict[str, LazyTensor]:
    """The tensors that the index names, each from the file that it names."""
    index = folder / INDEX_FILE
    placed = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(index, "weight_map is not a map from tensor names to file names")
    files = {file: open_file(inside(folder, file, index)) for file in sorted(set(placed.values()))}
    for name, file in placed.items():
        if name not in files[file]:
            raise CheckpointError(index, f"says that {file} holds {name!r}, but it does not")
    return {name: files[file][name] for name, file in placed.items()}


def inside(folder: Path, name: str, source: Path) -> Path:
    """The path of a shard, which must lie in the folder itself.

    Links are followed only to files beside the real folder or in a `blobs` store, as the Hugging Face cache has them.
    """
    if not name or name != Path(name).name or name in (".", ".."):
        raise CheckpointError(source, f"names the file {name!r}, which is not a plain name inside the folder")
    path = folder / name
    if not path.exists():
        raise CheckpointError(path, f"is missing, though {source.name} names it")
    real = path.resolve()
    root = folder.resolve()
    in_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if real.parent != root and not in_cache:
        raise CheckpointError(path, f"is a link out of the folder, to {real}")
    if not real.is_file():
        raise CheckpointError(path, "is not a regular file")
    return path


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object of bounded size. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= max_bytes else b""
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if size > max_bytes:
        raise CheckpointError(path, f"is {size} bytes; the limit is {max_bytes}")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        problem = mistaken_for(raw) or f"is not valid JSON: {error}; repair it or download it again"
        raise CheckpointError(path, problem) from error
    if not isinstance(found, dict):
        raise CheckpointError(path, f"must hold a JSON object, it holds a {type(found).__name__}")
    return found


def mistaken_for(head: bytes) -> str | None:
    """What a file that begins so is instead of a checkpoint's, and what to do; None when that is unknown."""
    start = head[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(LFS_MARK):
        return "is a git-LFS pointer, not the file itself; run `git lfs pull` in its repository, or download the file"
    if start.startswith(PAGE_MARKS):
        return "is an HTML page, not the file itself: its download failed; download it again, logged in if it is gated"
    return None


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file by name. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header, data_start = read_header(path, file, size)
        tensors = {name: parse_entry(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
        check_coverage(path, tensors, size - data_start)
        data = np.memmap(path, np.uint8, "r", offset=data_start) if size > data_start else np.zeros(0, np.uint8)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    return {
        name: from_array(name, data[begin:end].view(dtype).reshape(shape))
        for name, (dtype, shape, begin, end) in tensors.items()
    }


def read_header(path: Path, file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The header and where the data starts."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(path, f"has {size} bytes, too few for a header; the file is truncated")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:  # also any text, since its first 8 bytes make a huge number
        problem = f"says that its header has {length} bytes, more than the limit {MAX_HEADER_BYTES}"
        raise CheckpointError(path, mistaken_for(prefix + file.read(HEAD_BYTES)) or problem)
    if length > size - 8:
        raise CheckpointError(path, f"says that its header has {length} bytes, but only {size - 8} follow; truncated?")
    try:
        header = json.loads(file.read(length), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(path, "header is not a JSON object")
    if len(header) > MAX_TENSORS_PER_FILE:
        raise CheckpointError(path, f"has {len(header)} tensors, more than the limit {MAX_TENSORS_PER_FILE}")
    return header, 8 + length


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys: readers that keep the first and those that keep the last would disagree."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def parse_entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one tensor, its size checked."""
    if not isinstance(entry, dict):
        raise CheckpointError(path, f"{name!r} is not described by a JSON object")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        hint = "; fp8 and smaller formats need their scales and are not read yet" if str(code).startswith("F") else ""
        raise CheckpointError(path, f"{name!r} has dtype {code!r}, which is not one of {', '.join(DTYPES)}{hint}")
    if not is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(path, f"{name!r} has an invalid shape {shape!r}")
    if not is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(path, f"{name!r} has invalid data_offsets {offsets!r}")
    dtype = DTYPES[code]
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            path, f"{name!r} of shape {shape} {code} needs {needed} bytes, data_offsets give {offsets}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def is_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of integers that can be sizes."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**60 for item in value)


def check_coverage(path: Path, tensors: dict[str, tuple[np.dtype, tuple[int, ...], int, int]], size: int) -> None:
    """Tensors must cover the data without gap or overlap: a gap could hide another file, an overlap is an attack or
    an accident.
    """
    end = 0
    for name, (_, _, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise CheckpointError(
                path, f"{name!r} begins at byte {begin} of the data, the tensor before it ends at {end}"
            )
        end = stop
    if end != size:
        raise CheckpointError(
            path, f"tensors need {end} bytes of data, the file has {size}; it is truncated or has a tail"
        )
