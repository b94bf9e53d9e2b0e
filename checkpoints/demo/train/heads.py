"""Heads that let a frozen target draft for itself: they go on from its last hidden state, token by token.

Medusa's scheme (Cai et al. 2024, arXiv:2401.10774, "Medusa-1"): small residual blocks on the hidden state and the
target's own output head, trained while the target stays as it is. As in Hydra (Ankner et al. 2024, arXiv:2402.05109) a
head also sees the token before the one it predicts, so that it knows what was proposed; a head reads the state that
the head before it made instead of the embeddings of all tokens since.

Letters of the shapes: B batch, T positions, D hidden, V vocabulary.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.demo.train.config import HeadsConfig, ModelConfig
from checkpoints.demo.train.model import Multiply, Params, dense, rms_norm, unembed

BLOCK_SCALE, TOKEN_SCALE = 0.1, 0.3


def init(config: HeadsConfig, hidden: int, seed: int) -> Params:
    """Return fresh heads, which hand on the state nearly as it is."""
    rng = np.random.default_rng(seed)

    def matrix(scale: float) -> jax.Array:
        return jnp.asarray(rng.normal(0.0, scale * hidden**-0.5, (hidden, hidden)), jnp.float32)

    def block() -> Params:
        return {"block_proj": matrix(BLOCK_SCALE), "bias": jnp.zeros(hidden)}

    def head() -> Params:
        return {
            "state_norm": jnp.ones(hidden),
            "token_norm": jnp.ones(hidden),
            "input_proj": jnp.concatenate([jnp.eye(hidden), matrix(TOKEN_SCALE)]),
            "blocks": [block() for _ in range(config.blocks)],
        }

    return {"heads": [head() for _ in range(config.heads)]}


def advance(head: Params, state: jax.Array, embedded: jax.Array, eps: float, multiply: Multiply = dense) -> jax.Array:
    """Return a head's state [..., D] from the one before it and the embedding of the token between, both [..., D]."""
    parts = rms_norm(state, head["state_norm"], eps), rms_norm(embedded, head["token_norm"], eps)
    x = multiply(jnp.concatenate(parts, axis=-1), head["input_proj"])
    for block in head["blocks"]:
        x = x + jax.nn.silu(multiply(x, block["block_proj"]) + block["bias"])
    return x


def predictions(
    params: Params,
    target: Params,
    config: ModelConfig,
    states: jax.Array,
    tokens: jax.Array,
    multiply: Multiply = dense,
) -> Iterator[jax.Array]:
    """Yield each head's logits [B, P, V] at the first P = T - heads of the target's states [B, T, D].

    tokens: [B, T] of the text; head i, from 0, knows those up to i + 1 ahead and predicts the one after.
    """
    count = states.shape[1] - len(params["heads"])
    x = states[:, :count]
    for index, head in enumerate(params["heads"]):
        embedded = target["embed_tokens"][tokens[:, index + 1 : index + 1 + count]]
        x = advance(head, x, embedded, config.norm_eps, multiply)
        yield unembed(target, x, config, multiply)
