"""How often heads say what the target says, on held-out text and in float32."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.demo.train.config import ModelConfig
from checkpoints.demo.train.evaluate import windows
from checkpoints.demo.train.heads import predictions
from checkpoints.demo.train.model import Params, hidden_states, unembed


class HeadScore(NamedTuple):
    """Of one stream: `same` i64[heads] of its `positions` have the target's most likely token as the head's."""

    same: np.ndarray
    positions: int


@functools.cache
def comparer(config: ModelConfig) -> Callable[..., jax.Array]:
    """Return a compiled function (heads, target, tokens [B, T]) -> bool[heads, B, T - heads]."""

    def compare(heads: Params, target: Params, tokens: jax.Array) -> jax.Array:
        states = hidden_states(target, tokens, config, jnp.matmul)
        wanted = jnp.argmax(unembed(target, states, config, jnp.matmul), axis=-1)
        found = predictions(heads, target, config, states, tokens, jnp.matmul)
        choices = [jnp.argmax(logits, axis=-1) for logits in found]
        count = choices[0].shape[1]
        return jnp.stack([one == wanted[:, i + 1 : i + 1 + count] for i, one in enumerate(choices)])

    return jax.jit(compare)


def evaluate_heads(heads: Params, target: Params, config: ModelConfig, streams: Iterable[np.ndarray]
                   ) -> list[HeadScore]:  # fmt: skip
    """Compare along each of the streams. Head i is asked what the target, seeing i + 1 tokens more of the text, finds
    most likely; of those it is told as many: its share is that of proposals kept where all before them were.
    """
    compare, num_heads = comparer(config), len(heads["heads"])
    scores = []
    for stream in streams:
        same, positions = np.zeros(num_heads, np.int64), 0
        for inputs, _, real in windows(stream):
            counted = real[:, num_heads:]
            same += np.sum(np.asarray(compare(heads, target, inputs)) & counted, axis=(1, 2))
            positions += int(counted.sum())
        scores.append(HeadScore(same, positions))
    return scores


def agreement(scores: list[HeadScore]) -> np.ndarray:
    """Return the shares f64[heads] over all streams; nan where no stream is long enough."""
    positions = sum(score.positions for score in scores)
    return sum((score.same for score in scores), np.zeros(1)) / (positions or np.nan)
