"""The optimiser and one step of it."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import optax
import optax.contrib

from checkpoints.demo.train.config import TrainConfig
from checkpoints.demo.train.losses import Loss
from checkpoints.demo.train.model import Params


class State(NamedTuple):
    """All that a step changes."""

    params: Params
    optimiser: optax.OptState


def matrices_only(params: Params) -> Any:
    """Mark for Muon the matrices inside layers and heads; embeddings, norms and biases are left to Adam."""

    def mark(keys: tuple[Any, ...], _: jax.Array) -> Any:
        name = jax.tree_util.keystr(keys[-1:], simple=True)
        return optax.contrib.MuonDimensionNumbers() if name.endswith("_proj") else None

    return jax.tree.map_with_path(mark, params)


def optimiser(config: TrainConfig, params: Params) -> optax.GradientTransformation:
    """Muon for the matrices and Adam for the rest, both warmed up and then lowered linearly to zero."""

    def schedule(peak: float) -> optax.Schedule:
        warmup = min(config.warmup, config.steps // 2)
        rise = optax.linear_schedule(0.0, peak, warmup)
        fall = optax.linear_schedule(peak, 0.0, config.steps - warmup)
        return optax.join_schedules([rise, fall], [warmup])

    return optax.contrib.muon(
        schedule(config.matrix_rate),
        weight_decay=config.weight_decay,
        adam_learning_rate=schedule(config.other_rate),
        adam_b2=0.95,
        muon_weight_dimension_numbers=matrices_only(params),
    )


def make_step(loss: Loss, transform: optax.GradientTransformation) -> Callable[[State, jax.Array], tuple]:
    """Return the compiled step: (state, windows [B, T + 1]) -> (state, loss)."""

    def step(state: State, windows: jax.Array) -> tuple[State, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(state.params, windows)
        updates, new = transform.update(gradients, state.optimiser, state.params)
        return State(cast(Params, optax.apply_updates(state.params, updates)), new), value

    return jax.jit(step, donate_argnums=0)
