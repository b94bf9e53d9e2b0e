"""Programs compiled when a test first calls them, in less time than those that serve."""

import dataclasses

from jax.stages import Compiled

from jaxinfer.executor import Executor
from jaxinfer.programs import Key, Program, declare

QUICKLY = {"xla_backend_optimization_level": 0}
"""Two thirds of the time on a CPU; the code is slower, which a few tokens do not feel."""


class LazyPrograms(dict[Key, Compiled]):
    def __init__(self, declared: dict[Key, Program]):
        self._declared = declared

    def __contains__(self, key: object) -> bool:
        return key in self._declared

    def __missing__(self, key: Key) -> Compiled:
        program = self._declared[key]
        options = (program.compiler_options or {}) | QUICKLY
        return self.setdefault(key, dataclasses.replace(program, compiler_options=options).compile())


def warm_up_lazily(executor: Executor) -> None:
    """In place of `Executor.warm_up`."""
    executor._programs = LazyPrograms(declare(executor.signature))
