"""What the two models minimise, in nats per token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from checkpoints.demo.train.config import ModelConfig
from checkpoints.demo.train.model import Params, forward

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
        expected = jax.nn.log_softmax(jax.lax.stop_gradient(forward(teacher, inputs, teacher_config)))
        found = jax.nn.log_softmax(forward(params, inputs, config))
        return jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1))

    return loss
