"""A decoder driven by its config: nothing here knows a family's name.

Letters: T packed tokens, R rows, D model width, F feed-forward width, N query heads, K kv heads, H head width, V
vocabulary, L layers, M pages a row. Under a mesh the whole body runs in one `shard_map`: every shard has its own
heads, feed-forward columns and part of the vocabulary, and a layer's two all-reduces stand where they are written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxinfer import sharding
from jaxinfer.config import ModelConfig
from jaxinfer.kv_cache import page_size_of, pages_partition_spec
from jaxinfer.linear import QuantizedWeight, linear, matmul, out_features
from jaxinfer.model import Rows
from jaxinfer.models.norm import rms_norm
from jaxinfer.models.rope import apply_rope, rope_tables
from jaxinfer.params import Params, partition_specs
from pallas_kernels import ragged_paged_attention as attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@flax.struct.dataclass
class Step:
    """What all layers of a step share."""

    cos: jax.Array  # f32[T, H / 2]
    sin: jax.Array  # f32[T, H / 2]
    rows: Rows
    schedule: Any
    config: ModelConfig = flax.struct.field(pytree_node=False)
    max_q_len: int | None = flax.struct.field(pytree_node=False)
    implementation: str = flax.struct.field(pytree_node=False)
    axis: str | None = flax.struct.field(pytree_node=False)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    kv_pages: jax.Array,
    rows: Rows,
    *,
    implementation: str,
    max_q_len: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the packed tokens through all layers and writes their keys and values into the pages.

    Args:
      params: a tree of `params.param_specs`; its `layers` decide between the unrolled and the scanned loop.
      tokens: i32[T], ids; padding tokens may hold any id.
      positions: i32[T], each token's index in its own row.
      kv_pages: [L, P, ...] of `kv_cache`; donate it.
      rows: where the packed tokens belong.
      implementation: of the attention that owns the pages.
      max_q_len: the most queries of any row when known; 1 is a decode step.
      mesh: the mesh that params and pages are placed on.

    Returns:
      The last layer's hidden states [T, D], before the final norm, and the pages.
    """
    body = partial(local_forward, config=config, max_q_len=max_q_len, implementation=implementation)
    if mesh is None:
        return body(params, tokens, positions, kv_pages, rows, axis=None)
    pages = pages_partition_spec(implementation)
    whole = PartitionSpec()
    return jax.shard_map(
        partial(body, axis=sharding.TENSOR),
        mesh=mesh,
        in_specs=(partition_specs(params, config, mesh), whole, whole, pages, whole),
        out_specs=(whole, pages),
        check_vma=False,  # the attention kernels do not declare what varies
    )(params, tokens, positions, kv_pages, rows)


def logits(params: Params, config: ModelConfig, hidden: jax.Array, *, mesh: Mesh | None = None) -> jax.Array:
    """Final norm and head on chosen rows: hidden [R, D] to f32[R, V], whole on every device (by one all-gather)."""
    names = ("final_norm", "embed" if config.tie_word_embeddings else "head")
    used = {name: params[name] for name in names}
    if mesh is None:
        return local_logits(used, hidden, config=config, axis=None)
    specs = partition_specs(params, config, mesh)
    body = partial(local_logits, config=config, axis=sharding.TENSOR)
    in_specs = ({name: specs[name] for name in names}, PartitionSpec())
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)(used, hidden)


def embeddings(params: Params, config: ModelConfig, tokens: jax.Array, *, mesh: Mesh | None = None) -> jax.Array:
    """Rows [R, D] of the embedding for tokens i32[R], whole on every device."""
    if mesh is None:
        return embed(params["embed"], tokens, None)
    table, whole = partition_specs(params, config, mesh)["embed"], PartitionSpec()
    body = partial(embed, axis=sharding.TENSOR)
    return jax.shard_map(body, mesh=mesh, in_specs=(table, whole), out_specs=whole)(params["embed"], tokens)


def local_forward(
    params: Params, tokens, positions, kv_pages, rows, *, config, max_q_len, implementation, axis
) -> tuple[jax.Array, jax.Array]:
    """`forward` on one shard: params and pages are its own parts; the rest is whole."""
    # Without the barrier XLA fuses the tables into every layer: sines again for each of its heads.
    cos, sin = lax.optimization_barrier(rope_tables(config, positions))
    schedule = make_schedule(params, tokens, kv_pages, rows, config, max_q_len, implementation)
    step = Step(cos, sin, rows, schedule, config, max_q_len, implementation, axis)
    with jax.named_scope("embed"):
        x = embed(params["embed"], tokens, axis)
    layers = params["layers"]
    if isinstance(layers, dict):
        return scanned_layers(layers, x, kv_pages, step)
    return unrolled_layers(layers, x, kv_pages, step)


def local_logits(params: Params, hidden: jax.Array, *, config: ModelConfig, axis: str | None) -> jax.Array:
    with jax.named_scope("head"):
        x = rms_norm(hidden, params["final_norm"], config.rms_norm_eps)
        if config.tie_word_embeddings:
            scores = matmul(x, params["embed"], transposed=True)
        else:
            scores = linear(x, params["head"], out_dtype=jnp.float32)
        if axis is not None:
            scores = lax.all_gather(scores, axis, axis=1, tiled=True)
        return scores[:, : config.vocab_size]


def embed(table: jax.Array, tokens: jax.Array, axis: str | None) -> jax.Array:
    """Rows of the embedding [T, D]. Each shard has a part of the vocabulary: it looks up its own ids, and the sum
    completes the rest.
    """
    if axis is None:
        return table[tokens]
    local = tokens - lax.axis_index(axis) * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    return lax.psum(jnp.where(mine[:, None], table[jnp.where(mine, local, 0)], 0), axis)


def make_schedule(params, tokens, kv_pages, rows, config, max_q_len, implementation) -> Any:
    """The attention's work list of this step, for the heads of one shard."""
    layers = params["layers"]
    layer = layers if isinstance(layers, dict) else layers[0]
    return attention.make_schedule(
        *rows,
        num_tokens=tokens.shape[0],
        page_size=page_size_of(kv_pages, implementation),
        num_q_heads=out_features(layer["q"]["weight"]) // config.head_dim,
        num_kv_heads=out_features(layer["k"]["weight"]) // config.head_dim,
        head_dim=config.head_dim,
        dtype=params["embed"].dtype,
        kv_dtype=kv_pages.dtype,
        max_q_len=max_q_len,
        implementation=implementation,
    )


def unrolled_layers(layers: tuple[Params, ...], x: jax.Array, kv_pages: jax.Array, step: Step):
    """One layer after the other: a program as long as the model, in which no weight is copied on CPU and GPU.

    Layers of one kind are traced and lowered once, as a function that XLA inlines.
    """
    one_layer = jax.jit(decoder_layer, static_argnums=2)
    for index, (layer, window) in enumerate(zip(layers, step.config.windows, strict=True)):
        x, kv_pages = one_layer(layer, jnp.int32(index), window or None, x, kv_pages, step)
    return x, kv_pages


def scanned_layers(layers: Params, x: jax.Array, kv_pages: jax.Array, step: Step):
    """A scan over stacked layers. The pages are carried, never scanned over: that would copy them whole."""
    windows = step.config.windows
    same = len(set(windows)) == 1

    def body(carry, xs):
        sliced, index, window = xs
        x, kv_pages = carry
        layer = jax.tree.map(partial(entry, index), layers, sliced, is_leaf=is_quantized)
        return decoder_layer(layer, index, (windows[0] or None) if same else window, x, kv_pages, step), None

    indices = jnp.arange(len(windows), dtype=jnp.int32)
    sliced = jax.tree.map(lambda weight: None if is_quantized(weight) else weight, layers, is_leaf=is_quantized)
    return lax.scan(body, (x, kv_pages), (sliced, indices, jnp.asarray(windows, jnp.int32)))[0]


def is_quantized(weight: Any) -> bool:
    return isinstance(weight, QuantizedWeight)


def entry(index: jax.Array, stack: Any, sliced: Any) -> Any:
    """One layer's weight: the scan's own slice, or of a quantised one the whole stack and the index."""
    return stack.replace(layer=index) if is_quantized(stack) else sliced


def decoder_layer(layer: Params, index, window, x: jax.Array, kv_pages: jax.Array, step: Step):
    """Attention and feed-forward on the residual stream `x` [T, D]. window: tokens seen, maybe traced; None for all."""
    eps = step.config.rms_norm_eps
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer["attention_norm"], eps)
        attended, kv_pages = attention_block(layer, index, window, normed, kv_pages, step)
        x = x + attended
    with jax.named_scope("mlp"):
        x = x + mlp_block(layer, rms_norm(x, layer["mlp_norm"], eps), step)
    return x, kv_pages


def attention_block(layer: Params, index, window, x: jax.Array, kv_pages: jax.Array, step: Step):
    """Attention of `x` [T, D] over the pages: [T, D] and the pages. First all-reduce of the layer."""
    config = step.config
    q, k, v = (project(x, layer[name]).reshape(x.shape[0], -1, config.head_dim) for name in "qkv")  # [T, N or K, H]
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, layer["k_norm"], config.rms_norm_eps)
    q, k = apply_rope(q, step.cos, step.sin), apply_rope(k, step.cos, step.sin)
    out, pages = attention.ragged_paged_attention(
        q, k, v, kv_pages, index, *step.rows,
        schedule=step.schedule,
        scale=config.head_dim**-0.5,
        window=window,
        k_scale=layer.get("k_scale"),
        v_scale=layer.get("v_scale"),
        max_q_len=step.max_q_len,
        implementation=step.implementation,
    )  # fmt: skip
    return project(jnp.reshape(out, (x.shape[0], -1)), layer["o"], step.axis), jnp.asarray(pages)


def mlp_block(layer: Params, x: jax.Array, step: Step) -> jax.Array:
    """Gated feed-forward (Shazeer 2020, arXiv:2002.05202) of `x` [T, D]. Second all-reduce of the layer."""
    gate = ACTIVATIONS[step.config.activation](project(x, layer["gate"]))
    # Without the barrier XLA:TPU computes activation and product again for every block of the down projection: of a
    # layer of 8B with 2,048 tokens on a v6e 7.7 % of the bundles (libtpu 0.0.48, predicted). On a CPU it makes no
    # difference (0.98x to 1.01x, measured).
    return project(lax.optimization_barrier(gate * project(x, layer["up"])), layer["down"], step.axis)


def project(x: jax.Array, projection: Params, reduce_over: str | None = None) -> jax.Array:
    """`x` [T, in] through one projection and its bias. With `reduce_over`, `in` is cut over that axis and the parts
    are summed.
    """
    y = linear(x, projection["weight"])
    if reduce_over is not None:
        y = lax.psum(y, reduce_over)
    return y + projection["bias"] if "bias" in projection else y
