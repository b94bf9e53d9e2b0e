"""Contenders on a GPU: launched without waiting, timed in turns.

Launches are asynchronous in jax and in torch, so a turn launches a contender a few times and waits once: the host runs
ahead of the device unless a launch takes longer than its kernels, which then is what a user would see too.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.workloads import interleaved, median_ratio

TURN_SECONDS = 0.02
"""A turn is launched as often as fills this: far above the resolution of the clock, short enough to alternate."""
MAX_LAUNCHES = 2000


@dataclass(frozen=True)
class Contender:
    """`launch` starts one pass and returns without waiting; `wait` returns when everything launched has run."""

    name: str
    launch: Callable[[], None]
    wait: Callable[[], None]

    def turn(self, launches: int) -> float:
        """Seconds a pass, over so many launches."""
        self.wait()
        start = time.perf_counter()
        for _ in range(launches):
            self.launch()
        self.wait()
        return (time.perf_counter() - start) / launches


def of_jax(name: str, step: Callable[[Any], Any], state: Any) -> Contender:
    """A compiled function from its state to its next state (donated), called on what it returned before."""
    held = [state]

    def launch() -> None:
        held[0] = step(held[0])

    return Contender(name, launch, lambda: jax.block_until_ready(held[0]))


def race(contenders: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds a pass of each contender in each round; everything has run and settled before it counts."""
    launches = {one.name: warm(one) for one in contenders}
    return interleaved(rounds, {one.name: (lambda one=one: one.turn(launches[one.name])) for one in contenders})


def warm(contender: Contender) -> int:
    """Runs it until it has compiled and settled; how many launches fill a turn."""
    contender.turn(2)
    seconds = contender.turn(3)
    return min(MAX_LAUNCHES, max(1, round(TURN_SECONDS / max(seconds, 1e-7))))


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def card() -> str:
    """The device kind, as the driver names the card."""
    return jax.devices()[0].device_kind


def speedup(found: Mapping[str, list[float]], ours: str) -> tuple[float, str]:
    """How many times faster ours is than the fastest other contender (median of the rounds' ratios), and its name."""
    others = {name: median(seconds) for name, seconds in found.items() if name != ours}
    best = min(others, key=lambda name: others[name])
    return median_ratio(found[best], found[ours]), best
