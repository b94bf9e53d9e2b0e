"""What the two models and the heads minimise, in nats per token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from checkpoints.demo.train.config import ModelConfig
from checkpoints.demo.train.heads import predictions
from checkpoints.demo.train.model import Params, forward, hidden_states, unembed

Loss = Callable[[Params, jax.Array], jax.Array]


def cross_entropy(config: ModelConfig) -> Loss:
    """Return the loss of predicting a text: a function of weights and windows [B, T + 1]."""

    def loss(params: Params, windows: jax.Array) -> jax.Array:
        logits = forward(params, windows[:, :-1], config)
        chosen = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    return loss


def distillation(config: ModelConfig, teacher: Params, teacher_config: ModelConfig) -> Loss:
    """Return the loss of imitating a frozen teacher: the mean KL(teacher || student) over all of V."""

    def loss(params: Params, windows: jax.Array) -> jax.Array:
        inputs = windows[:, :-1]
        expected = jax.lax.stop_gradient(forward(teacher, inputs, teacher_config))
        return divergence(expected, forward(params, inputs, config))

    return loss


def foresight(target: Params, config: ModelConfig) -> Loss:
    """Return the loss of heads on a frozen target: the mean over the heads of KL(target || head), where the target
    sees all tokens before the predicted one, and head i its state i + 1 tokens earlier and the tokens since.
    """

    def loss(heads: Params, windows: jax.Array) -> jax.Array:
        states = jax.lax.stop_gradient(hidden_states(target, windows, config))
        expected = unembed(target, states, config)
        found = list(predictions(heads, target, config, states, windows))
        count = found[0].shape[1]
        parts = [divergence(expected[:, i + 1 : i + 1 + count], each) for i, each in enumerate(found)]
        return sum(parts, jnp.zeros(())) / len(parts)

    return loss


def divergence(expected: jax.Array, found: jax.Array) -> jax.Array:
    """Return the mean KL between the distributions of two sets of logits [..., V]."""
    wanted = jax.nn.log_softmax(expected)
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(found)), axis=-1))
