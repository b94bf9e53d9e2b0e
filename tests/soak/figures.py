"""What a soak loop measured."""

from collections.abc import Callable

Figures = Callable[..., None]
"""Notes figures of a test: figures(cases=10_000, restarts=0)."""
