"""The training forward of a Llama: dense and causal, over a dictionary of float32 weights stored [in, out].

Letters of the shapes: B batch, T positions, D hidden, N query heads, K key-value heads, G = N / K, H size of a head,
V vocabulary, I and O the inputs and outputs of a matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.demo.train.config import ModelConfig

# A query never looks ahead, so short blocks of queries meet few keys: half the work of the full square.
QUERY_BLOCK = 64

Params = dict[str, Any]
Multiply = Callable[[jax.Array, jax.Array], jax.Array]


def init(config: ModelConfig, seed: int) -> Params:
    """Return fresh weights; matrices that write into the residual stream start smaller, as in GPT-2."""
    rng = np.random.default_rng(seed)
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, intermediate = config.hidden, config.intermediate
    residual = (2 * config.layers) ** -0.5

    def matrix(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(0.0, scale * rows**-0.5, (rows, columns)), jnp.float32)

    def layer() -> Params:
        return {
            "input_layernorm": jnp.ones(hidden),
            "q_proj": matrix(hidden, query),
            "k_proj": matrix(hidden, key),
            "v_proj": matrix(hidden, key),
            "o_proj": matrix(query, hidden, residual),
            "post_attention_layernorm": jnp.ones(hidden),
            "gate_proj": matrix(hidden, intermediate),
            "up_proj": matrix(hidden, intermediate),
            "down_proj": matrix(intermediate, hidden, residual),
        }

    embed = jnp.asarray(rng.normal(0.0, 0.02, (config.vocabulary, hidden)), jnp.float32)
    return {"embed_tokens": embed, "layers": [layer() for _ in range(config.layers)], "norm": jnp.ones(hidden)}


def count(params: Params) -> int:
    """Return the number of weights."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@jax.custom_vjp
def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply `x` [..., I] by `weight` [I, O] in bfloat16, adding up in float32; so does the way back."""
    return jnp.matmul(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _dense_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dense(x, weight), (x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))


def _dense_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    gradient = gradient.astype(jnp.bfloat16)
    rows, columns = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    to_x = jnp.matmul(gradient, weight.T, preferred_element_type=jnp.float32)
    return to_x, jnp.matmul(rows.T, columns, preferred_element_type=jnp.float32)


dense.defvjp(_dense_forward, _dense_backward)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scale each row of `x` [..., D] to a root mean square of one, then by `weight` [D]."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Apply rotary positions to `x` [B, T, N, H], pairing the first half of H with the second."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half) / half)
    angles = (jnp.arange(x.shape[1])[:, None] * frequencies)[:, None, :]
    cos = jnp.cos(jnp.stack([angles, angles], axis=-2))
    sin = jnp.stack([-jnp.sin(angles), jnp.sin(angles)], axis=-2)
    halves = x.reshape(*x.shape[:-1], 2, half)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape)


def attend_block(query: jax.Array, key: jax.Array, value: jax.Array, start: int) -> jax.Array:
    """Attend causally from queries [B, K, G, t, H], the first at `start`, to keys and values [B, K, S, H]."""
    batch, kv_heads, groups, length, head_dim = query.shape
    rows = query.reshape(batch * kv_heads, groups * length, head_dim)
    key, value = (x.reshape(batch * kv_heads, -1, head_dim) for x in (key, value))
    scores = jnp.einsum("brh,bsh->brs", rows, key) * head_dim**-0.5
    scores = scores.reshape(batch * kv_heads, groups, length, -1)
    visible = (start + jnp.arange(length))[:, None] >= jnp.arange(key.shape[1])
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    mixed = jnp.einsum("brs,bsh->brh", weights.reshape(rows.shape[0], rows.shape[1], -1), value)
    return mixed.reshape(query.shape)


def attention(layer: Params, x: jax.Array, config: ModelConfig, multiply: Multiply) -> jax.Array:
    """Grouped-query causal self-attention over `x` [B, T, D]."""
    batch, length, _ = x.shape
    groups = config.heads // config.kv_heads

    def heads(name: str) -> jax.Array:
        return multiply(x, layer[name]).reshape(batch, length, -1, config.head_dim)

    query = rotate(heads("q_proj"), config.rope_theta)
    query = query.reshape(batch, length, config.kv_heads, groups, config.head_dim).transpose(0, 2, 3, 1, 4)
    key = rotate(heads("k_proj"), config.rope_theta).transpose(0, 2, 1, 3)
    value = heads("v_proj").transpose(0, 2, 1, 3)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        blocks.append(attend_block(query[..., start:end, :], key[:, :, :end], value[:, :, :end], start))
    mixed = jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4)
    return multiply(mixed.reshape(batch, length, -1), layer["o_proj"])


def swiglu(layer: Params, x: jax.Array, multiply: Multiply) -> jax.Array:
    """The gated feed-forward of `x` [B, T, D]."""
    gated = jax.nn.silu(multiply(x, layer["gate_proj"])) * multiply(x, layer["up_proj"])
    return multiply(gated, layer["down_proj"])


def hidden_states(params: Params, tokens: jax.Array, config: ModelConfig, multiply: Multiply = dense) -> jax.Array:
    """Return the last layer's states [B, T, D] of `tokens` [B, T], before the final norm."""
    eps = config.norm_eps
    x = params["embed_tokens"][tokens]
    for layer in params["layers"]:
        x = x + attention(layer, rms_norm(x, layer["input_layernorm"], eps), config, multiply)
        x = x + swiglu(layer, rms_norm(x, layer["post_attention_layernorm"], eps), multiply)
    return x


def unembed(params: Params, states: jax.Array, config: ModelConfig, multiply: Multiply = dense) -> jax.Array:
    """Return the logits [..., V] of states [..., D]: the final norm, then the embedding turned."""
    return multiply(rms_norm(states, params["norm"], config.norm_eps), params["embed_tokens"].T)


def forward(params: Params, tokens: jax.Array, config: ModelConfig, multiply: Multiply = dense) -> jax.Array:
    """Return the logits [B, T, V] of `tokens` [B, T]; `multiply` is `jnp.matmul` for float32 all the way."""
    return unembed(params, hidden_states(params, tokens, config, multiply), config, multiply)
