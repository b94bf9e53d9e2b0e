"""The scales of int8 and fp8 pages: how large keys and values get, measured once, layer by layer and head by head.

Pages hold x / scale, and what exceeds the dtype's largest number is cut off. The ranges come from one run of the model
over a fixed text (`calibration.txt`) with pages of full precision; a converted model may bring them along.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxinfer import sharding
from jaxinfer.config import ModelConfig
from jaxinfer.model import Rows
from jaxinfer.models import Decoder, make_decoder
from jaxinfer.params import KV_SCALES, Params
from jaxinfer.tokenizer import Tokenizer
from pallas_kernels import ragged_paged_attention as attention
from pallas_kernels.ragged_paged_attention.page_dtypes import LARGEST

MARGIN = 1.5
"""Of int8 over the largest magnitude seen: other texts go further. The demo's bits per byte stay within 0.01 % for
margins of 1 to 2 (2026-11-21, 41 windows of 512 held-out tokens, jax 0.11.2 on a CPU).
"""

TEXT = Path(__file__).with_name("calibration.txt")
PAGE_SIZE = 16
MAX_TOKENS = 512
"""Of the text; a tokenizer with a large vocabulary makes fewer of it."""


class KVRanges(NamedTuple):
    """The largest magnitudes seen, f32[L, K] each; K without repeated heads."""

    keys: np.ndarray
    values: np.ndarray


def calibration_tokens(tokenizer: Tokenizer | None, config: ModelConfig) -> list[int]:
    """Ids of the fixed text, or pseudo-random ones for a model without a tokenizer (or with one of another model)."""
    most = min(MAX_TOKENS, config.max_position_embeddings)
    if tokenizer is not None:
        ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:most]
        if max(ids) < config.vocab_size:
            return ids
    return np.random.default_rng(0).integers(0, config.vocab_size, most).tolist()


def ranges_of_model(
    config: ModelConfig, params: Params, tokenizer: Tokenizer | None, *, dtype: Any, mesh: Mesh | None = None
) -> KVRanges:
    """The ranges of a model whose activations are of `dtype`."""
    model = make_decoder(config, dtype=dtype, page_size=PAGE_SIZE, mesh=mesh)
    return measure(model, params, calibration_tokens(tokenizer, config), PAGE_SIZE)


def measure(model: Decoder, params: Params, tokens: list[int], page_size: int) -> KVRanges:
    """Runs `tokens` through the model, whose pages must be of full precision, and reads its pages.

    A key's pairs of features turn with its position, so its range is that of the pairs' lengths, which do not: it
    holds for positions that the text never reached.
    """
    repeats = sharding.sharded_sizes(model.config, sharding.tensor_parallel_size(model.mesh)).kv_repeats
    run = jax.jit(partial(_ranges, model, page_size))
    keys, values = run(params, jnp.asarray(tokens, jnp.int32))
    return KVRanges(np.asarray(keys)[:, ::repeats], np.asarray(values)[:, ::repeats])


def _ranges(model: Decoder, page_size: int, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    (count,) = tokens.shape
    num_pages = -(-count // page_size)
    indices = jnp.arange(num_pages, dtype=jnp.int32)
    rows = Rows(
        jnp.full((1,), count, jnp.int32), indices[None], jnp.array([0, count], jnp.int32),
        jnp.array([0, 0, 1], jnp.int32),
    )  # fmt: skip
    cache = model.cache(num_pages, page_size)
    pages = lax.with_sharding_constraint(jnp.zeros(cache.shape, cache.dtype), cache.sharding)
    _, pages = model.forward(params, tokens, jnp.arange(count, dtype=jnp.int32), pages, rows, max_q_len=None)

    def layer_ranges(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, values = attention.pages_to_dense(pages, layer, indices, count, implementation=model.implementation)
        halves = jnp.split(jnp.asarray(keys, jnp.float32), 2, axis=-1)
        return jnp.hypot(*halves).max((0, 2)), jnp.abs(jnp.asarray(values, jnp.float32)).max((0, 2))

    return lax.map(layer_ranges, jnp.arange(model.config.num_layers))


def scales(ranges: KVRanges, kv_dtype: Any) -> KVRanges:
    """f32[L, K] of keys and of values for pages of `kv_dtype`.

    int8 spreads its 255 numbers evenly, so they must just cover the range. fp8 is a floating point number, as precise
    at scale 1 as at any other (0.045 % more bits per byte of the demo, and 0.055 % with the range spread over all of
    fp8): its scale is 1 unless the range would go beyond 448, its largest number.
    """
    name = jnp.dtype(kv_dtype).name
    # Heads of zeros must not divide by zero.
    least = 1.0 if name == "float8_e4m3fn" else 1e-6
    return KVRanges(*(np.maximum(part * (MARGIN / LARGEST[name]), least).astype(np.float32) for part in ranges))


def with_scales(params: Params, model: Decoder, found: KVRanges) -> Params:
    """The parameter tree with the scales of every layer, placed like the kv heads of the pages."""
    repeats = sharding.sharded_sizes(model.config, sharding.tensor_parallel_size(model.mesh)).kv_repeats
    stacks = dict(zip(KV_SCALES, (np.repeat(part, repeats, axis=1) for part in found), strict=True))
    layers = params["layers"]
    if isinstance(layers, dict):
        place = sharding.sharding(model.mesh, sharding.partition_spec(("layers", "kv_scales")))
        return params | {"layers": layers | {name: jax.device_put(x, place) for name, x in stacks.items()}}
    place = sharding.sharding(model.mesh, sharding.partition_spec(("kv_scales",)))
    scaled = [
        layer | {name: jax.device_put(x[index], place) for name, x in stacks.items()}
        for index, layer in enumerate(layers)
    ]
    return params | {"layers": tuple(scaled)}
