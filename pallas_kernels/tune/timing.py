"""Candidates timed on the device that is here. Everything it gives is measured."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tune.choosing import Trial
from pallas_kernels.tune.operations import Blocks, Call, Key, Operation

UNIT = "measured microseconds"
ROUNDS = 15
# Calls in one program, so that starting it counts little.
REPEATS = 32


def measure(operation: Operation, key: Key, candidates: Sequence[Blocks]) -> list[Trial]:
    """Medians over rounds, in each of which every candidate runs once: whatever slows the device slows all of them."""
    programs: dict[int, Callable[[], Any]] = {}
    errors: dict[int, str] = {}
    for index, blocks in enumerate(candidates):
        try:
            programs[index] = ready(operation.call(key, blocks))
        except jax.errors.JaxRuntimeError as error:  # blocks that do not fit
            errors[index] = str(error).strip().splitlines()[0][:120]
    seconds = dict(zip(programs, interleaved(list(programs.values()), ROUNDS), strict=True))
    return [
        Trial(blocks, error=errors[index]) if index in errors else Trial(blocks, seconds[index] / REPEATS * 1e6)
        for index, blocks in enumerate(candidates)
    ]


def ready(call: Call) -> Callable[[], Any]:
    """A compiled program that makes REPEATS calls one after the other, run once; arguments without values are ones."""
    arguments = tuple(
        jnp.ones(each.shape, each.dtype) if isinstance(each, jax.ShapeDtypeStruct) else jnp.asarray(each)
        for each in call.arguments
    )

    def again(_, current):
        results = call.function(*current)
        # Ties the next call to this one's results, so that none is left out or moved in front of the loop.
        results, current = jax.lax.optimization_barrier((results, current))
        if call.pages is None:
            return current
        return (*current[: call.pages], results[1], *current[call.pages + 1 :])

    program = jax.jit(lambda *current: jax.lax.fori_loop(0, REPEATS, again, current))
    jax.block_until_ready(program(*arguments))
    return lambda: jax.block_until_ready(program(*arguments))


def interleaved(programs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each, run in turn `rounds` times."""
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for index, program in enumerate(programs):
            begin = time.perf_counter()
            program()
            seconds[index].append(time.perf_counter() - begin)
    return [median(each) for each in seconds]
