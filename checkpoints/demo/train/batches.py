"""Batches of windows of the token stream, each a function of (seed, step) alone."""

import numpy as np


def batch(stream: np.ndarray, seed: int, step: int, size: int, length: int) -> np.ndarray:
    """Return the windows of one step, int32 [size, length + 1]: inputs and, shifted by one, their targets.

    Every epoch lays a grid of windows over the stream [S] at its own offset and visits it in its own order.
    """
    windows = (len(stream) - 1) // length - 1
    epoch, position = divmod(step, windows // size)
    rng = np.random.default_rng((seed, epoch))
    offset = rng.integers(length)
    chosen = rng.permutation(windows)[position * size : (position + 1) * size]
    starts = offset + chosen * length
    return stream[starts[:, None] + np.arange(length + 1)]
