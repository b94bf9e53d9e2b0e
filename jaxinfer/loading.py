"""A model folder to placed parameters. The only importer of `checkpoints`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

import checkpoints
import checkpoints.convert
from checkpoints import config_reader, heads, orbax_store, placement, rules, tensors
from checkpoints.errors import CheckpointError
from checkpoints.families import FAMILIES
from checkpoints.safetensors_reader import open_safetensors
from jaxinfer import sharding
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.errors import InvalidConfig, ModelFormatError
from jaxinfer.kv_scales import KVRanges
from jaxinfer.linear import QuantizedWeight
from jaxinfer.models.medusa import HeadsConfig, head_specs
from jaxinfer.params import (
    LayerLoop,
    Params,
    ParamSpec,
    default_layer_loop,
    fit,
    flatten_specs,
    init_params,
    is_spec,
    leaves_at,
    param_specs,
    source_paths,
)
from jaxinfer.quantization import WEIGHT_FORMATS, quantized, spec_of
from jaxinfer.stacking import stacked
from jaxinfer.stored_weights import assemble, evenly_cut

DEMO_FOLDERS = {"demo": "target", "demo-draft": "draft", "demo-medusa": "medusa"}
KV_RANGE_PATHS = ("kv_ranges/keys", "kv_ranges/values")
PROGRESS_AFTER_SECONDS = 2.0
MISFIT_HINT = "download the model again, or take the config.json that belongs to it"


@contextmanager
def format_errors() -> Iterator[None]:
    """Errors of `checkpoints` as ModelFormatErrors."""
    try:
        yield
    except CheckpointError as error:
        raise ModelFormatError(str(error)) from error


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its devices.

    folder: where its tokenizer files are. quantization: of its weights, as asked for or as they were stored.
    kv_ranges: of keys and values, where the model was converted with them.
    """

    config: ModelConfig
    params: Params
    folder: Path
    quantization: str | None = None
    kv_ranges: KVRanges | None = None


def load_model(
    model: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    layer_loop: LayerLoop | None = None,
    quantization: str | None = None,
) -> LoadedModel:
    """Reads a model folder (or "demo", "demo-draft") and places its parameters on the mesh, or on the first device.

    Args:
      model: a folder with config.json and safetensors, or one that `checkpoints.convert` wrote.
      dtype: of the parameters; stored ones are rounded to it.
      layer_loop: None takes the back end's own (`params.default_layer_loop`).
      quantization: "int8" or "int8_weight_only" quantises the projections tensor by tensor; None leaves them as they
        are stored.

    Raises:
      ModelFormatError: naming the file or tensor, what was expected and what was found.
      InvalidConfig: the model cannot be cut over the mesh, or was converted with another quantization.
    """
    folder = model_folder(model)
    kv_ranges = None
    with format_errors():
        raw = config_reader.read_config(folder)
        config = model_config(raw)
        layer_loop = layer_loop or default_layer_loop(mesh)
        if orbax_store.is_store(folder):
            quantization = served_quantization(folder, quantization)
            params = restore_params(folder, config, dtype, mesh, layer_loop, WEIGHT_FORMATS[quantization])
            kv_ranges = restore_kv_ranges(folder, config)
        else:
            lazy = rules.map_tensors(open_safetensors(folder), FAMILIES[config.family], raw, folder)
            params = place_params(lazy, config, folder, dtype, mesh, layer_loop, WEIGHT_FORMATS[quantization])
    return LoadedModel(config, params, folder, quantization, kv_ranges)


def served_quantization(folder: Path, wanted: str | None) -> str | None:
    """What the weights of a folder are served with: what it was converted with, which `wanted` must not contradict.

    Raises InvalidConfig, and ModelFormatError for a folder that cannot be read or a name that is not known here.
    """
    with format_errors():
        stored = orbax_store.stored_quantization(folder) if orbax_store.is_store(folder) else None
    if stored not in WEIGHT_FORMATS:
        raise ModelFormatError(f"{folder}: quantization {stored!r} is not known; convert the model again")
    if stored is not None and wanted not in (None, stored):
        raise InvalidConfig(
            "quantization",
            f"{wanted!r}, but {folder} was converted with {stored!r}; leave it out, or name the original model, or "
            f"convert that with --quantization {wanted}",
        )
    return stored or wanted


def write(
    folder: Path,
    target: str | Path,
    *,
    dtype: Any,
    quantization: str | None,
    quantize: checkpoints.convert.Quantize,
    kv_ranges: KVRanges | None,
) -> None:
    """What `conversion.convert` writes, of the model in `folder`; `quantize` as in `checkpoints.convert`.

    Raises ModelFormatError.
    """
    extra: dict[str, np.ndarray] = {}
    if kv_ranges is not None:
        extra.update(zip(KV_RANGE_PATHS, kv_ranges, strict=True))
    with format_errors():
        checkpoints.convert.convert(
            folder, target, dtype=dtype, quantization=quantization, quantize=quantize, extra=extra
        )


def read_config(folder: Path) -> ModelConfig:
    """The config.json of a folder. Raises ModelFormatError."""
    with format_errors():
        return model_config(config_reader.read_config(folder))


def stored_dtype(folder: Path) -> str | None:
    """Name of the dtype that the folder's config says its weights have; None where it is silent.

    Raises ModelFormatError.
    """
    with format_errors():
        config = config_reader.read_raw_config(folder)
    name = config.get("dtype") or config.get("torch_dtype")
    return name if isinstance(name, str) else None


def dtype_of(folder: Path) -> str:
    """"float32" where the weights are stored so, else "bfloat16": what dtype="auto" means."""
    return "float32" if stored_dtype(folder) == "float32" else "bfloat16"


def model_folder(model: str | Path) -> Path:
    """The folder of a model or of heads, shipped (DEMO_FOLDERS) or not. Raises ModelFormatError when it is missing."""
    if str(model) in DEMO_FOLDERS:
        folder = Path(checkpoints.__file__).parent / "demo" / DEMO_FOLDERS[str(model)]
    else:
        folder = Path(model).expanduser()
    if not folder.is_dir():
        known = ", ".join(DEMO_FOLDERS)
        raise ModelFormatError(f"{folder} is not a folder; give a model folder or one of {known} (heads, no model)")
    return folder


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """ModelConfig from the plain dictionary of `checkpoints.config_reader`."""
    return ModelConfig(**{**raw, "rope": RopeConfig(**raw["rope"])})


def read_heads_config(folder: Path) -> HeadsConfig:
    """The config.json of heads. Raises ModelFormatError."""
    with format_errors():
        return HeadsConfig(**heads.read_heads_config(folder))


def load_heads(folder: Path, config: HeadsConfig, *, dtype: Any, mesh: Mesh | None) -> Params:
    """The parameters of heads (`models.medusa.head_specs`), whole on every device. Raises ModelFormatError."""
    specs = head_specs(config, dtype)
    paths = dict(flatten_specs(specs))
    with format_errors():
        lazy = heads.open_heads(folder)
        check_tensors(lazy, paths, folder, lambda path: rules.Origin(heads.name_of(path), len(paths[path].shape) == 2))
        leaves = [place_weight([lazy[path]], spec, mesh) for path, spec in paths.items()]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), leaves)


def target_fingerprint(params: Params) -> str:
    """What a target's parameters have to give for heads that name it (`HeadsConfig.target_fingerprint`)."""
    return heads.fingerprint(np.asarray(params["final_norm"]))


def place_params(
    lazy: dict[str, tensors.LazyTensor],
    config: ModelConfig,
    folder: Path,
    dtype: Any,
    mesh: Mesh | None,
    layer_loop: LayerLoop,
    weight_format: str | None = None,
) -> Params:
    """The parameter tree on its devices, from tensors by tree path. Each device's part is read straight from the
    file.
    """
    sources = dict(flatten_specs(param_specs(config, dtype=dtype)))
    check_tensors(lazy, sources, folder, lambda path: rules.origin(path, FAMILIES[config.family]))
    specs = partial(
        param_specs, config, dtype=dtype, tensor_parallel=sharding.tensor_parallel_size(mesh), layer_loop=layer_loop
    )
    target = specs()
    kept = leaves_at(specs(weight_format=weight_format), target)
    leaves = []
    for (path, spec), wanted in tqdm(
        list(zip(flatten_specs(target), kept, strict=True)),
        desc=f"loading {folder.name}",
        unit="tensor",
        delay=PROGRESS_AFTER_SECONDS,
        leave=False,
        disable=None,  # no bar without a terminal
    ):
        names = source_paths(path, config.num_layers)
        parts = [fitted(lazy[name], sources[name], spec, config.head_dim) for name in names]
        leaves.append(place_weight(parts, wanted, mesh))
    return jax.tree.unflatten(jax.tree.structure(target, is_leaf=is_spec), leaves)


def place_weight(parts: list[tensors.LazyTensor], wanted: ParamSpec | QuantizedWeight, mesh: Mesh | None) -> Any:
    """One weight of the tree from one tensor, or from one a layer, as `wanted` has it."""
    if isinstance(wanted, QuantizedWeight):
        place = sharding.sharding(mesh, sharding.partition_spec(spec_of(wanted).axes[-2:]))
        return quantized((placement.place(tensors.transposed(part), place) for part in parts), wanted, mesh)
    rounded = [tensors.cast(part, wanted.dtype) for part in parts]
    axes = wanted.axes[-len(parts[0].shape) :]
    place = sharding.sharding(mesh, sharding.partition_spec(axes))
    placed = (placement.place(part, place) for part in rounded)
    return stacked(placed, wanted, mesh, lambda weight: weight) if len(axes) < len(wanted.axes) else next(placed)


def check_tensors(
    found: Mapping[str, tensors.TensorInfo | tensors.LazyTensor],
    specs: dict[str, ParamSpec],
    folder: Path,
    origin: Callable[[str], rules.Origin] = rules.Origin,
) -> None:
    """Every weight there, none too many, each of its shape and a float. Raises ModelFormatError.

    origin: from a path of the tree to the tensor of the file; by default a file has our own paths.
    """
    missing = {origin(path).name for path in specs if path not in found}
    if missing:
        raise ModelFormatError(
            f"{folder}: {len(missing)} tensors are missing: {rules.shorten(missing)}; {MISFIT_HINT}"
        )
    surplus = [found[path].name for path in found if path not in specs]
    if surplus:
        raise ModelFormatError(
            f"{folder}: config.json has no place for {len(surplus)} tensors: {rules.shorten(surplus)}"
        )
    check_shapes({path: found[path].shape for path in specs}, specs, folder, origin)
    for path, spec in specs.items():
        wanted = jnp.floating if jnp.issubdtype(spec.dtype, jnp.floating) else spec.dtype
        if not jnp.issubdtype(found[path].dtype, wanted):
            name = "a float dtype" if wanted is jnp.floating else jnp.dtype(spec.dtype).name
            raise ModelFormatError(f"{folder}: {origin(path).name}: expected {name}, found {found[path].dtype}")


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    specs: dict[str, ParamSpec],
    folder: Path,
    origin: Callable[[str], rules.Origin],
) -> None:
    """Raises ModelFormatError unless the shapes are those of `specs`; its message has them as the file does."""
    wrong = []
    for path, spec in specs.items():
        if found[path] != spec.shape:
            there = origin(path)
            label = f"{there.name} (its part {path})" if there.is_part else there.name
            wrong.append(f"{label}: expected shape {there.shape(spec.shape)}, found {there.shape(found[path])}")
    if wrong:
        raise ModelFormatError(
            f"{folder}: {len(wrong)} tensors do not have the shape that config.json asks for: "
            f"{rules.shorten(wrong, '; ')}; {MISFIT_HINT}"
        )


def fitted(tensor: tensors.LazyTensor, source: ParamSpec, target: ParamSpec, head_dim: int) -> tensors.LazyTensor:
    """`tensor` with kv heads repeated and the vocabulary padded as the target's shards need (`params.fit` without
    arrays).
    """
    wanted = target.shape[-len(source.shape) :]
    for axis, (name, old, new) in enumerate(zip(source.axes, source.shape, wanted, strict=True)):
        if old != new and name == "kv_heads":
            tensor = tensors.repeated(tensor, axis, head_dim, new // old)
        elif old != new:
            tensor = tensors.padded(tensor, axis, new)
    return tensor


def restore_params(
    folder: Path,
    config: ModelConfig,
    dtype: Any,
    mesh: Mesh | None,
    layer_loop: LayerLoop,
    weight_format: str | None = None,
) -> Params:
    """The parameter tree from our own form: every device restores its part, then layers are stacked and heads
    repeated if need be. Weights that are still to be quantised are restored one at a time.
    """
    stored_format = WEIGHT_FORMATS[orbax_store.stored_quantization(folder)]
    sources = dict(flatten_specs(param_specs(config, dtype=dtype, weight_format=stored_format)))
    held = orbax_store.stored(folder)
    check_tensors({path: info for path, info in held.items() if path not in KV_RANGE_PATHS}, sources, folder)
    specs = partial(
        param_specs, config, dtype=dtype, tensor_parallel=sharding.tensor_parallel_size(mesh), layer_loop=layer_loop
    )
    target = specs(weight_format=stored_format)
    kept = leaves_at(specs(weight_format=weight_format), target)
    later = {
        name
        for (path, _), wanted in zip(flatten_specs(target), kept, strict=True)
        if isinstance(wanted, QuantizedWeight)
        for name in source_paths(path, config.num_layers)
    }
    found = restore(folder, {path: spec for path, spec in sources.items() if path not in later}, mesh)
    leaves = []
    for (path, spec), wanted in zip(flatten_specs(target), kept, strict=True):
        names = source_paths(path, config.num_layers)
        source = sources[names[0]]
        if isinstance(wanted, QuantizedWeight):
            weights = (restored_rows_first(folder, name, source, spec, config.head_dim, mesh) for name in names)
            leaves.append(quantized(weights, wanted, mesh))
        else:
            parts = [found.pop(name) for name in names]
            place = sharding.sharding(mesh, sharding.partition_spec(spec.axes))
            leaves.append(assemble(parts, source, spec, config.head_dim, place))
    return jax.tree.unflatten(jax.tree.structure(target, is_leaf=is_spec), leaves)


def restore(folder: Path, sources: Mapping[str, ParamSpec], mesh: Mesh | None) -> dict[str, jax.Array]:
    """Stored weights in the dtypes of their specs."""
    wanted = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=evenly_cut(spec, mesh))
        for path, spec in sources.items()
    }
    return orbax_store.restore(folder, wanted)


def restored_rows_first(
    folder: Path, name: str, source: ParamSpec, target: ParamSpec, head_dim: int, mesh: Mesh | None
) -> jax.Array:
    """One stored weight [D, F] as [F, D] with the shape of the target's shards, in the precision it is stored in."""
    stored = replace(source, dtype=orbax_store.stored(folder)[name].dtype)
    part = restore(folder, {name: stored}, mesh)[name]
    shape = target.shape[-len(source.shape) :]
    place = sharding.sharding(mesh, sharding.partition_spec(source.axes[::-1]))
    return jax.jit(lambda x: fit(x, source, head_dim, shape).T, out_shardings=place)(part)


def restore_kv_ranges(folder: Path, config: ModelConfig) -> KVRanges | None:
    """The ranges of keys and values that a model was converted with. Raises ModelFormatError for a wrong shape."""
    stored = orbax_store.stored(folder)
    if not all(path in stored for path in KV_RANGE_PATHS):
        return None
    spec = ParamSpec((config.num_layers, config.num_kv_heads), jnp.float32, (None, None))
    found = restore(folder, dict.fromkeys(KV_RANGE_PATHS, spec), None)
    return KVRanges(*(np.asarray(found[path]) for path in KV_RANGE_PATHS))


def random_params(
    config: ModelConfig,
    seed: int = 0,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    layer_loop: LayerLoop | None = None,
) -> Params:
    """Random weights in the model's shape, made on their shards; for tests and benchmarks."""
    return init_params(config, seed, dtype=dtype, mesh=mesh, layer_loop=layer_loop or default_layer_loop(mesh))
