"""Figures on held-out text, in float32: bits per byte, and how often the draft's choice is the target's."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.demo.train.config import CONTEXT, ModelConfig
from checkpoints.demo.train.model import Params, forward

BATCH = 4


class Score(NamedTuple):
    """A model's loss on a stream [S] in bits, and its most likely token after each token but the last, [S - 1]."""

    bits: float
    greedy: np.ndarray


def windows(stream: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut a stream into batches of inputs, targets and a mask of what is not padding, each [BATCH, CONTEXT]."""
    block = BATCH * CONTEXT
    inputs, targets = stream[:-1], stream[1:]
    for start in range(0, len(inputs), block):
        length = min(block, len(inputs) - start)

        def square(part: np.ndarray, padding: int = block - length) -> np.ndarray:
            return np.pad(part, (0, padding)).reshape(BATCH, CONTEXT)

        end = start + length
        yield square(inputs[start:end]), square(targets[start:end]), square(np.ones(length, bool))


@functools.cache
def scorer(config: ModelConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return a compiled function (params, inputs, targets [B, T]) -> losses in nats and greedy tokens [B, T]."""

    def score(params: Params, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = forward(params, inputs, config, jnp.matmul)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1)

    return jax.jit(score)


def evaluate(params: Params, config: ModelConfig, streams: Iterable[np.ndarray]) -> list[Score]:
    """Score a model on each of the streams, which it meets in windows of `CONTEXT` tokens."""
    score = scorer(config)
    scores = []
    for stream in streams:
        nats, greedy = 0.0, []
        for inputs, targets, real in windows(stream):
            losses, choices = score(params, inputs, targets)
            nats += float(np.sum(np.asarray(losses, np.float64), where=real))
            greedy.append(np.asarray(choices)[real])
        scores.append(Score(nats / math.log(2), np.concatenate(greedy)))
    return scores


def agreement(targets: list[Score], drafts: list[Score]) -> float:
    """Return the share of positions where both models find the same token most likely."""
    same = [target.greedy == draft.greedy for target, draft in zip(targets, drafts, strict=True)]
    return float(np.mean(np.concatenate(same)))
