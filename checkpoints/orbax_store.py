"""Our own form of a checkpoint: an Orbax folder of parameters by tree path, beside a manifest that says what is in it.

folder/checkpoint.json    the manifest; written last, so that a folder without it is not a checkpoint
folder/params/            Orbax
"""

import gc
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.safetensors_reader import DTYPES, MAX_DIMENSIONS, MAX_TENSORS_PER_FILE, is_sizes, read_json
from checkpoints.tensors import TensorInfo

if TYPE_CHECKING:
    import jax

MANIFEST = "checkpoint.json"
PARAMS = "params"
FORMAT = "orbax-params"
VERSION = 1
MAX_MANIFEST_BYTES = 100_000_000
MOST_REASON = 300
"""Characters of another library's error that ours repeats."""
SYSTEM_ERROR = re.compile(r": ([^:]+) \[os_error_code='\d+'")
"""As TensorStore ends the text of an error: "... to file 12: No space left on device [os_error_code='28']".
"""
DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}


def is_store(folder: str | Path) -> bool:
    """Whether the folder says it is one of ours; `stored` finds out whether that is true."""
    return (Path(folder) / MANIFEST).exists()


def save(
    folder: str | Path, params: "Mapping[str, np.ndarray | jax.Array]", *, quantization: str | None = None
) -> None:
    """Writes arrays by tree path ("layers/0/q/weight"), then the manifest. The folder must exist and hold no
    checkpoint.

    quantization: what was done to the weights, by name, for `stored_quantization`.

    Raises CheckpointError when it holds one already, OSError when the disk does not take it.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).resolve()
    if (folder / PARAMS).exists() or is_store(folder):
        raise CheckpointError(folder, "holds a checkpoint already; choose another folder or remove it")
    try:
        with only_the_first_error(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / PARAMS, nested(params))
    except Exception as error:  # TensorStore's are ValueErrors
        if isinstance(error, (OSError, MemoryError)):
            raise
        raise OSError(f"{folder}: cannot be written ({refused_write(first_cause(error))}); make room or choose another "
                      "folder") from error
    tensors = {
        path: {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name} for path, array in params.items()
    }
    manifest = {"format": FORMAT, "version": VERSION, "quantization": quantization, "tensors": tensors}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1))
    partial.rename(folder / MANIFEST)


def stored(folder: str | Path) -> dict[str, TensorInfo]:
    """What a committed checkpoint holds, by tree path.

    Raises CheckpointError when it was never finished, or when its manifest is malformed or of another version.
    """
    path = Path(folder) / MANIFEST
    tensors = read_manifest(folder).get("tensors")
    if not isinstance(tensors, dict) or len(tensors) > MAX_TENSORS_PER_FILE:
        raise CheckpointError(path, "tensors is not a map of bounded size")
    if not (Path(folder) / PARAMS / "_CHECKPOINT_METADATA").is_file():
        raise CheckpointError(folder, f"{PARAMS} is missing or was never finished")
    return {name: parse_info(path, name, entry) for name, entry in tensors.items()}


def stored_quantization(folder: str | Path) -> str | None:
    """What `save` was told of the weights; None where they are as the model's publisher made them.

    Raises CheckpointError as `stored`, and when it is no name.
    """
    name = read_manifest(folder).get("quantization")
    if not isinstance(name, str | None):
        raise CheckpointError(Path(folder) / MANIFEST, f"quantization is {name!r}, expected a name or null")
    return name


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest, of the version that this code writes. Raises CheckpointError."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(folder, f"has no {MANIFEST}: saving it was never finished")
    manifest = read_json(path, MAX_MANIFEST_BYTES)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        raise CheckpointError(path, f"is {found}, expected {FORMAT!r} version {VERSION}; convert the model again")
    return manifest


def parse_info(path: Path, name: str, entry: Any) -> TensorInfo:
    """One tensor of the manifest, validated."""
    shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
    if not is_sizes(shape) or len(shape) > MAX_DIMENSIONS or str(dtype) not in DTYPE_NAMES:
        raise CheckpointError(path, f"{name!r} is {entry!r}, expected a shape and one of {', '.join(DTYPE_NAMES)}")
    return TensorInfo(name, tuple(shape), DTYPE_NAMES[str(dtype)])


def restore(folder: str | Path, targets: "Mapping[str, jax.ShapeDtypeStruct]") -> "dict[str, jax.Array]":
    """The arrays of a checkpoint by tree path, each in its target's dtype, read by every device of its target's
    sharding.

    Args:
      targets: paths of `stored(folder)`, all or some, with their stored shapes; the others are not read.

    Raises CheckpointError when a path, a shape or the data is not as the manifest says.
    """
    import jax
    import orbax.checkpoint as ocp

    found = stored(folder)
    for path, target in targets.items():
        if path not in found or found[path].shape != tuple(target.shape):
            raise CheckpointError(folder, f"{path}: expected shape {target.shape}, found {found.get(path)}")
    if not targets:
        return {}
    item = nested(targets)
    wanted = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, only_the_first_error():
            tree = checkpointer.restore(Path(folder).resolve() / PARAMS, args=wanted)
        arrays = {path: lookup(tree, path) for path in targets}
    except Exception as error:  # of any type: Orbax trusts its files, and raises bare Exceptions itself
        cause = first_cause(error)
        if isinstance(cause, (MemoryError, jax.errors.JaxRuntimeError)):  # the machine's fault and not the folder's
            raise
        raise CheckpointError(folder, f"cannot be restored ({shortened(cause)}); convert the model again") from error
    for path, array in arrays.items():  # of what it does not find, Orbax gives back the target
        if not isinstance(array, jax.Array) or array.shape != tuple(targets[path].shape):
            raise CheckpointError(folder, f"cannot be restored ({PARAMS} has no {path}); convert the model again")
    return arrays


@contextmanager
def only_the_first_error() -> Iterator[None]:
    """Orbax reads all arrays at once: where a file is damaged, asyncio logs a traceback for each of the others."""
    log = logging.getLogger("asyncio")
    log.addFilter(is_no_lost_error)
    try:
        yield
    except BaseException:
        gc.collect()  # asyncio logs when a task that nobody has asked is freed
        raise
    finally:
        log.removeFilter(is_no_lost_error)


def is_no_lost_error(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def first_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else first_cause(error.__cause__)


def shortened(error: BaseException) -> str:
    """An error in one short line; TensorStore adds pages of JSON."""
    text = str(error).partition(" [tensorstore_spec")[0].partition("\n")[0]
    return f"{type(error).__name__}: {text[:MOST_REASON]}"


def refused_write(error: BaseException) -> str:
    """What the system said of a write; TensorStore says before it for which array, in pages where paths are long."""
    found = SYSTEM_ERROR.search(str(error))
    return shortened(error) if found is None else found[1]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dictionaries from a map by path."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *front, last = path.split("/")
        node = tree
        for key in front:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def lookup(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree
