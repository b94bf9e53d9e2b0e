"""What a token drafted elsewhere was sampled from: few candidates that are told with it, never taken unchecked.

The drafter makes it of log-probabilities (`of_top`), the engine checks it (`checked`). No jax here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SUM_TOLERANCE = 1e-3
"""Probabilities whose sum is farther from 1 are malformed; others are scaled to it."""
TIE = 1e-4
"""Log-probabilities nearer to each other than this may be of values that are equal to the sampler, by its rounding."""


class Claimed(NamedTuple):
    """What is said of num_tokens proposals, num_candidates ids and probabilities of each: as it came, of any length."""

    num_tokens: int
    num_candidates: int
    ids: np.ndarray  # i32[num_tokens * num_candidates] if it is well-formed
    chances: np.ndarray  # f32, likewise


class Distributions(NamedTuple):
    """Of n tokens. Ids say nothing beside a chance of 0; where all are 0, nothing is known of the token."""

    ids: np.ndarray  # i32[n, N]
    chances: np.ndarray  # f32[n, N]


def of_top(top: Sequence[tuple[int, float]], temperature: float, most: int) -> tuple[list[int], list[float]]:
    """Ids and probabilities of what a request of this temperature, with top-k `most`, samples from; `most` of each.

    top: its likeliest tokens and their raw log-probabilities, likeliest first, `most` + 1 of them or the whole
    vocabulary. Zeros fill up. All are 0 where the last candidate may be tied with tokens behind it: the sampler keeps
    ties, and how many there are is not known.
    """
    logprobs = [logprob for _, logprob in top]
    if len(top) > most and not logprobs[most - 1] - logprobs[most] > TIE:
        return [0] * most, [0.0] * most
    weights = [math.exp((logprob - logprobs[0]) / temperature) for logprob in logprobs[:most]]
    total, zeros = sum(weights), most - len(weights)
    return [id for id, _ in top[:most]] + [0] * zeros, [weight / total for weight in weights] + [0.0] * zeros


def placed(claim: Claimed | None, first: int, count: int, width: int) -> Distributions:
    """What is claimed of `count` proposals from `first` on, [count, width]: NaN where the lengths are wrong, 0 where
    nothing is claimed.
    """
    found = Distributions(np.zeros((count, width), np.int32), np.zeros((count, width), np.float32))
    if claim is None:
        return found
    size, each = claim.num_tokens * claim.num_candidates, claim.num_candidates
    if not 1 <= each <= width or len(claim.ids) != size or len(claim.chances) != size:
        found.chances[:] = np.nan
        return found
    for whole, told in zip(found, (claim.ids, claim.chances), strict=True):
        whole[:, :each] = told.reshape(-1, each)[first:first + count]
    return found


def checked(told: Distributions, tokens: np.ndarray, vocab_size: int) -> tuple[Distributions, int, int]:
    """Of tokens i32[n] of the vocabulary: distributions of sum 1, how many of them were told and how many malformed.

    A distribution counts if its probabilities are finite, not negative and of sum 1 within SUM_TOLERANCE, and the ids
    with a probability distinct, of the vocabulary, and the token among them. Otherwise the token is a given one: the
    one candidate of its distribution. told: [n, N].
    """
    ids, chances = told
    some, known = chances != 0, chances > 0  # NaN is some
    with np.errstate(over="ignore", invalid="ignore"):
        sums = chances.sum(axis=1, dtype=np.float64, keepdims=True)
    apart = np.sort(np.where(known, ids, -1 - np.arange(ids.shape[1])), axis=1)
    good = ((known == some).all(axis=1) & (np.abs(sums[:, 0] - 1.0) <= SUM_TOLERANCE)
            & (~known | ((ids >= 0) & (ids < vocab_size))).all(axis=1)
            & (apart[:, 1:] != apart[:, :-1]).all(axis=1)
            & (known & (ids == tokens[:, None])).any(axis=1))  # fmt: skip
    given = Distributions(np.zeros_like(ids), np.zeros_like(chances))
    given.ids[:, 0], given.chances[:, 0] = tokens, 1.0
    scaled = chances / np.where(good[:, None], sums, 1.0)
    found = Distributions(np.where(good[:, None] & known, ids, given.ids),
                          np.where(good[:, None], scaled, given.chances).astype(np.float32))  # fmt: skip
    return found, int(good.sum()), int((some.any(axis=1) & ~good).sum())
