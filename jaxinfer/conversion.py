"""`jaxinfer convert`: a model folder in our own form, quantised on request, with the ranges that int8 pages need."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import kv_scales, loading
from jaxinfer.config import ModelConfig
from jaxinfer.linear import QuantizedWeight
from jaxinfer.params import flatten_specs, leaves_at, param_specs
from jaxinfer.quantization import WEIGHT_FORMATS, check_quantization
from jaxinfer.tokenizer import TOKENIZER_FILE, Tokenizer
from pallas_kernels.int8_matmul import quantize_weight


def convert(
    model: str | Path,
    target: str | Path,
    dtype: str | None = None,
    quantization: str | None = None,
    with_kv_ranges: bool = False,
) -> None:
    """Writes a model in our own Orbax form, with its config and tokenizer files, to `target`, which must not exist.

    Args:
      dtype: of the stored weights that are not quantised; None keeps the file's.
      quantization: "int8" or "int8_weight_only" of the projections, each from the precision of the file, one at a
        time on the first device. A model so stored is served with it and with no other.
      with_kv_ranges: run the model once and store how large keys and values get (`kv_scales`); it must fit the first
        device.

    Raises ModelFormatError and InvalidConfig.
    """
    check_quantization(quantization)
    folder = loading.model_folder(model)
    paths = projection_paths(loading.read_config(folder), WEIGHT_FORMATS[quantization])
    ranges = None
    if with_kv_ranges:
        chosen = jnp.dtype(dtype or loading.dtype_of(folder))
        loaded = loading.load_model(folder, dtype=chosen, quantization=quantization)
        tokenizer = Tokenizer.from_folder(folder) if (folder / TOKENIZER_FILE).is_file() else None
        ranges = kv_scales.ranges_of_model(loaded.config, loaded.params, tokenizer, dtype=chosen)
    loading.write(
        folder,
        target,
        dtype=None if dtype is None else jnp.dtype(dtype),
        quantization=quantization,
        quantize=partial(quantized_arrays, paths),
        kv_ranges=ranges,
    )


def projection_paths(config: ModelConfig, weight_format: str | None) -> frozenset[str]:
    """Paths of the weights that a format quantises."""
    specs = param_specs(config)
    kept = leaves_at(param_specs(config, weight_format=weight_format), specs)
    paths = (path for path, _ in flatten_specs(specs))
    return frozenset(path for path, one in zip(paths, kept, strict=True) if isinstance(one, QuantizedWeight))


def quantized_arrays(paths: frozenset[str], path: str, tensor: Any) -> dict[str, np.ndarray] | None:
    """What is stored of a lazy tensor [D, F]: int8 values [F, D] and scales [F, 1]; None for none of `paths`."""
    if path not in paths:
        return None
    values, scale = jax.jit(quantize_weight)(np.ascontiguousarray(tensor[...].swapaxes(-1, -2)))
    return {f"{path}/values": np.asarray(values), f"{path}/scale": np.asarray(scale)}
