"""One record a weight. It feeds random init, sharding, loading, the memory plan and shape errors.

A parameter tree is `{"embed", "layers", "final_norm"}` and, unless the embedding is tied, `"head"`. `layers` is a
tuple of L dictionaries when the layer loop is unrolled, and one dictionary of arrays with a leading axis L when it is
scanned. Of a quantised weight the tree of specs holds a `QuantizedWeight` of specs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import sharding
from jaxinfer.config import ModelConfig
from jaxinfer.errors import ModelFormatError
from jaxinfer.linear import QuantizedWeight
from pallas_kernels.dispatch import device_of

type LayerLoop = Literal["unrolled", "scanned"]
type Params = dict[str, Any]

SCANNED_DEVICES = ("TPU v5", "TPU v6", "TPU7x")
"""Prefixes of device kinds on which slices of stacked weights fuse into the matmul: v5e, v5p, v6e, and tpu7x with
`programs.compiler_options`. Elsewhere a scan copies every layer's weights first, as seen in compiled programs.
"""


KV_SCALES = ("k_scale", "v_scale")
"""Of a layer with int8 or fp8 pages, f32[K] each."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """Shape, dtype, meaning and birth of one weight.

    axes: logical axis of each dimension (`sharding.MESH_AXIS_OF`). init: "normal" (variance 1 / fan in), "ones" or
    "zeros". in_axis, out_axis: the dimensions a projection contracts and produces; None for vectors. Their order is
    the storage order.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    in_axis: int | None = None
    out_axis: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array, all shards together."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def stacked(self, num_layers: int) -> "ParamSpec":
        """The spec of `num_layers` such weights along a new leading axis."""
        shift = [None if axis is None else axis + 1 for axis in (self.in_axis, self.out_axis)]
        return replace(
            self, shape=(num_layers, *self.shape), axes=("layers", *self.axes), in_axis=shift[0], out_axis=shift[1]
        )


def default_layer_loop(mesh: Mesh | None = None) -> LayerLoop:
    """Scanned where a scan reads stacked weights in place, unrolled on CPU and GPU.

    mesh: what the model runs on, which need not be here; None is the first device.
    """
    return "scanned" if device_of(mesh).kind.startswith(SCANNED_DEVICES) else "unrolled"


def param_specs(
    config: ModelConfig,
    *,
    dtype: Any = jnp.bfloat16,
    tensor_parallel: int = 1,
    layer_loop: LayerLoop = "unrolled",
    weight_format: str | None = None,
    kv_scales: bool = False,
) -> Params:
    """The tree of ParamSpec of a model on `tensor_parallel` shards. Shapes are those of the whole arrays.

    weight_format: `QuantizedWeight.format` of the layers' projections; None leaves them in `dtype`. kv_scales: with the
    scales of int8 or fp8 pages, which are no weights of a model's files.

    Raises InvalidConfig when the model cannot be cut so (`sharding.sharded_sizes`).
    """
    sizes = sharding.sharded_sizes(config, tensor_parallel)
    width, vocab = config.hidden_size, sizes.vocab_size
    layer = layer_specs(config, sizes, dtype)
    if kv_scales:
        layer |= dict.fromkeys(KV_SCALES, ParamSpec((sizes.num_kv_heads,), jnp.float32, ("kv_scales",), "ones"))
    if weight_format is not None:
        layer = jax.tree.map(lambda spec: quantized_spec(spec, weight_format), layer, is_leaf=is_spec)
    specs: Params = {
        "embed": ParamSpec((vocab, width), dtype, ("vocab", "model"), in_axis=0, out_axis=1),
        "layers": (layer,) * config.num_layers,
        "final_norm": ParamSpec((width,), dtype, ("model",), "ones"),
    }
    if layer_loop == "scanned":
        specs["layers"] = jax.tree.map(lambda spec: spec.stacked(config.num_layers), layer, is_leaf=is_spec)
    if not config.tie_word_embeddings:
        specs["head"] = ParamSpec((width, vocab), dtype, ("model", "vocab"), in_axis=0, out_axis=1)
    return specs


def layer_specs(config: ModelConfig, sizes: sharding.ShardedSizes, dtype: Any) -> Params:
    """Specs of one layer. Float projections are stored [in, out]: what CPUs want, and no worse elsewhere."""
    model, ffn = ("model", config.hidden_size), ("ffn", config.intermediate_size)
    heads = ("heads", config.num_heads * config.head_dim)
    kv_heads = ("kv_heads", sizes.num_kv_heads * config.head_dim)

    def projection(ins: tuple[str, int], outs: tuple[str, int], bias: bool) -> Params:
        weight = ParamSpec((ins[1], outs[1]), dtype, (ins[0], outs[0]), in_axis=0, out_axis=1)
        return {"weight": weight} | ({"bias": ParamSpec((outs[1],), dtype, (outs[0],), "zeros")} if bias else {})

    def norm(axis: str, size: int) -> ParamSpec:
        return ParamSpec((size,), dtype, (axis,), "ones")

    specs: Params = {
        "attention_norm": norm(*model),
        "q": projection(model, heads, config.attention_bias),
        "k": projection(model, kv_heads, config.attention_bias),
        "v": projection(model, kv_heads, config.attention_bias),
        "o": projection(heads, model, config.attention_out_bias),
        "mlp_norm": norm(*model),
        "gate": projection(model, ffn, config.mlp_bias),
        "up": projection(model, ffn, config.mlp_bias),
        "down": projection(ffn, model, config.mlp_bias),
    }
    if config.qk_norm:
        specs |= {"q_norm": norm("head_dim", config.head_dim), "k_norm": norm("head_dim", config.head_dim)}
    return specs


def quantized_spec(spec: ParamSpec, weight_format: str) -> ParamSpec | QuantizedWeight:
    """A projection's spec as int8 values, output features first, with a scale an output feature; other specs stay."""
    if spec.in_axis is None or spec.out_axis is None:
        return spec
    ins, outs = spec.in_axis, spec.out_axis
    stack = slice(min(ins, outs))
    values = ParamSpec(
        (*spec.shape[stack], spec.shape[outs], spec.shape[ins]),
        jnp.int8,
        (*spec.axes[stack], spec.axes[outs], spec.axes[ins]),
        in_axis=max(ins, outs),
        out_axis=min(ins, outs),
    )
    scale = ParamSpec((*values.shape[:-1], 1), jnp.float32, (*values.axes[:-1], None), "ones")
    return QuantizedWeight(cast(Any, values), cast(Any, scale), format=weight_format)


def is_spec(node: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=is_spec)`."""
    return isinstance(node, ParamSpec)


def flatten_specs(specs: Params) -> Iterator[tuple[str, ParamSpec]]:
    """Pairs of path ("layers/0/q/weight") and spec, in tree order."""
    for keys, spec in jax.tree.flatten_with_path(specs, is_leaf=is_spec)[0]:
        yield path_name(keys), spec


def path_name(keys: tuple[Any, ...]) -> str:
    """Key path of `jax.tree.flatten_with_path` as "layers/0/q/weight", or ".../weight/scale" of a quantised one."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def total_bytes(specs: Params) -> int:
    """Bytes of all weights, all shards together."""
    return sum(spec.num_bytes for _, spec in flatten_specs(specs))


def abstract_params(
    config: ModelConfig,
    *,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    layer_loop: LayerLoop = "unrolled",
    weight_format: str | None = None,
    kv_scales: bool = False,
) -> Params:
    """The tree as `jax.ShapeDtypeStruct`s with their shardings: for compiling before anything is loaded."""
    specs = param_specs(
        config, dtype=dtype, tensor_parallel=sharding.tensor_parallel_size(mesh), layer_loop=layer_loop,
        weight_format=weight_format, kv_scales=kv_scales,
    )  # fmt: skip

    def struct(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        place = sharding.sharding(mesh, sharding.partition_spec(spec.axes))
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place)

    return jax.tree.map(struct, specs, is_leaf=is_spec)


def layer_loop_of(params: Params) -> LayerLoop:
    """Which layer loop a parameter tree is made for."""
    return "scanned" if isinstance(params["layers"], dict) else "unrolled"


def partition_specs(params: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    """PartitionSpecs of a parameter tree, leaf by leaf, quantised weights included."""
    layers = params["layers"]
    specs = param_specs(
        config, tensor_parallel=sharding.tensor_parallel_size(mesh), layer_loop=layer_loop_of(params),
        kv_scales=KV_SCALES[0] in (layers if isinstance(layers, dict) else layers[0]),
    )  # fmt: skip
    return jax.tree.map(leaf_partition, specs, params, is_leaf=is_spec)


def leaf_partition(spec: ParamSpec, leaf: Any) -> Any:
    if not isinstance(leaf, QuantizedWeight):
        return sharding.partition_spec(spec.axes)
    parts = quantized_spec(spec, leaf.format)
    if not isinstance(parts, QuantizedWeight):
        raise ModelFormatError(f"a weight of shape {spec.shape} is no projection and cannot be quantised")
    values, scale = (sharding.partition_spec(cast(Any, part).axes) for part in (parts.values, parts.scale))
    return replace(leaf, values=values, scale=scale, zero=None if leaf.zero is None else scale)


def check_params(params: Params, specs: Params) -> None:
    """Raises ModelFormatError naming the first weight whose shape differs from its spec."""
    for (path, spec), leaf in zip(flatten_specs(specs), leaves_at(params, specs), strict=True):
        if not isinstance(leaf, QuantizedWeight) and tuple(leaf.shape) != spec.shape:
            raise ModelFormatError(f"{path}: expected shape {spec.shape}, found {tuple(leaf.shape)}")


def leaves_at(params: Params, specs: Params) -> list[Any]:
    """The leaves of `params` where `specs` has its own; a quantised weight counts as one."""
    return jax.tree.structure(specs, is_leaf=is_spec).flatten_up_to(params)


def init_params(
    config: ModelConfig,
    seed: int = 0,
    *,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    layer_loop: LayerLoop = "unrolled",
) -> Params:
    """Random weights, made directly on their shards. The same seed is the same model on any mesh and in either layer
    loop.
    """
    tensor_parallel = sharding.tensor_parallel_size(mesh)
    source = param_specs(config, dtype=dtype)
    target = param_specs(config, dtype=dtype, tensor_parallel=tensor_parallel, layer_loop=layer_loop)
    paths = dict(flatten_specs(source))
    key = jax.random.key(seed)
    leaves = []
    for path, spec in flatten_specs(target):
        names = source_paths(path, config.num_layers)
        keys = jnp.stack([jax.random.fold_in(key, list(paths).index(name)) for name in names])
        place = sharding.sharding(mesh, sharding.partition_spec(spec.axes))
        make = jax.jit(draw, static_argnums=(1, 2, 3), out_shardings=place)
        leaves.append(make(keys, paths[names[0]], spec, config.head_dim))
    return jax.tree.unflatten(jax.tree.structure(target, is_leaf=is_spec), leaves)


def draw(keys: jax.Array, source: ParamSpec, target: ParamSpec, head_dim: int) -> jax.Array:
    """Weights of `source`'s law, one for each of the keys, in the shape of `target`."""
    fan_in = 1 if source.in_axis is None else source.shape[source.in_axis]
    # An embedding's rows are looked up, not summed: scale them like the residual stream of a trained model.
    scale = fan_in**-0.5 if source.axes[:1] != ("vocab",) else source.shape[1] ** -0.5

    def one(key: jax.Array) -> jax.Array:
        if source.init != "normal":
            value = jnp.full(source.shape, 1.0 if source.init == "ones" else 0.0, source.dtype)
        else:
            value = (jax.random.normal(key, source.shape) * scale).astype(source.dtype)
        return fit(value, source, head_dim, target.shape[-len(source.shape) :])

    values = jax.vmap(one)(keys)
    return values if len(target.shape) > len(source.shape) else values[0]


def source_paths(path: str, num_layers: int) -> list[str]:
    """Paths in the unrolled tree that make up `path`: itself, or one a layer for a stacked weight."""
    first, _, rest = path.partition("/")
    if first != "layers" or rest.split("/")[0].isdigit():
        return [path]
    return [f"layers/{layer}/{rest}" for layer in range(num_layers)]


def fit(value: jax.Array, spec: ParamSpec, head_dim: int, shape: tuple[int, ...]) -> jax.Array:
    """`value` of `spec` with kv heads repeated and the vocabulary padded with zeros to reach `shape`."""
    for axis, (name, old, new) in enumerate(zip(spec.axes, value.shape, shape, strict=True)):
        if old == new:
            continue
        if name == "kv_heads":
            heads = value.reshape(*value.shape[:axis], old // head_dim, head_dim, *value.shape[axis + 1 :])
            value = jnp.repeat(heads, new // old, axis=axis).reshape(*value.shape[:axis], new, *value.shape[axis + 1 :])
        elif name == "vocab":
            value = jnp.pad(value, [(0, new - old if i == axis else 0) for i in range(value.ndim)])
        else:
            raise ModelFormatError(f"axis {name!r} of size {old} cannot become {new}")
    return value
