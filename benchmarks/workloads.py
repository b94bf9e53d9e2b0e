"""The loads that the benches run, and the order in which they measure: each contender once a round, round by round."""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

SHORTEST, LONGEST = 8, 256
"""Tokens of the prompts and outputs of the mixed load."""

VOCAB_SIZE = 4096
"""Ids of the demo model."""


def log_uniform(count: int, rng: random.Random, low: int = SHORTEST, high: int = LONGEST) -> list[int]:
    """`count` lengths, log-uniform in low..high, in random order.

    One from the middle of each of `count` equally likely ranges, so that a load of 24 has the same mix as one of 256.
    """
    lengths = [round(low * (high / low) ** ((index + 0.5) / count)) for index in range(count)]
    rng.shuffle(lengths)
    return lengths


def random_prompt(length: int, rng: random.Random) -> list[int]:
    """Random ids without 0, the end of a text."""
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]


def interleaved(rounds: int, contenders: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each contender measured in each round, in turns from the first to the last and from the last to the first.
    The last round's numbers stand on stderr while it runs.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        turn = list(contenders.items())
        for name, measure in turn if number % 2 else reversed(turn):
            found[name].append(measure())
        latest = ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.items())
        print(f"round {number} of {rounds}: {latest}", file=sys.stderr, flush=True)
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each round: its halves ran next to each other, so noise hit both."""
    return [one / other for one, other in zip(above, below, strict=True)]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(ratios(above, below))


def is_quick(description: str | None, argv: Sequence[str] | None = None) -> bool:
    """Whether the command line asks for the smoke run: tiny loads, numbers without meaning."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    return parser.parse_args(argv).quick
