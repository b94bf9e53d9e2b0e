"""The training loop, which leaves checkpoints behind and continues from them."""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from checkpoints.demo.train.batches import batch
from checkpoints.demo.train.config import TrainConfig
from checkpoints.demo.train.losses import Loss
from checkpoints.demo.train.model import Params
from checkpoints.demo.train.optimise import State, make_step, optimiser

SAVE_SECONDS = 120.0


class Trained(NamedTuple):
    """Trained weights with the seconds spent, those before an interruption included."""

    params: Params
    seconds: float


class Progress(tqdm):
    """A bar with the loss, the tokens per second and the time that is left."""

    def __init__(self, config: TrainConfig, first: int) -> None:
        super().__init__(total=config.steps, initial=first, unit="step", mininterval=5.0)
        self.step_tokens = config.batch * config.context
        self.loss: float | None = None

    def advance(self, loss: float) -> None:
        """Count one step, whose loss goes into a moving average."""
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        speed = self.step_tokens * (self.format_dict["rate"] or 0.0)
        self.set_postfix_str(f"loss {self.loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.update()


def train(loss: Loss, params: Params, stream: np.ndarray, config: TrainConfig, folder: Path) -> Trained:
    """Train on the stream [S], from the newest checkpoint in `folder` if it holds one.

    The order of the data depends on the step alone, so an interrupted run continues exactly.
    """
    transform = optimiser(config, params)
    step = make_step(loss, transform)
    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)) as checkpoints:
        first, state, seconds = restore(checkpoints, State(params, transform.init(params)))
        saved = time.monotonic()
        started = saved - seconds
        with Progress(config, first) as bar:
            for index in range(first, config.steps):
                windows = batch(stream, config.seed, index, config.batch, config.context)
                state, value = step(state, jnp.asarray(windows))
                bar.advance(float(value))
                if index + 1 == config.steps or time.monotonic() - saved > SAVE_SECONDS:
                    saved = time.monotonic()
                    seconds = saved - started
                    save(checkpoints, index + 1, state, seconds)
    return Trained(state.params, seconds)


def save(checkpoints: ocp.CheckpointManager, step: int, state: State, seconds: float) -> None:
    """Write the state after `step` steps, with the seconds they took."""
    parts = ocp.args.Composite(state=ocp.args.StandardSave(state), clock=ocp.args.JsonSave({"seconds": seconds}))
    checkpoints.save(step, args=parts)


def restore(checkpoints: ocp.CheckpointManager, fresh: State) -> tuple[int, State, float]:
    """Return the newest checkpoint's step, state and seconds; those of a start, with `fresh`, if there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return 0, fresh, 0.0
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
    parts = checkpoints.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes), clock=ocp.args.JsonRestore())
    )
    return step, parts["state"], parts["clock"]["seconds"]
