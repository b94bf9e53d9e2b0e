"""What the tool tries: keys of shape classes, blocks, and calls with given blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

type Key = Mapping[str, str | int]
type Blocks = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A function and its arguments: arrays where values decide how long it runs, shapes elsewhere.

    pages: index of the argument that the second result replaces (it may be overwritten); None for none.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    pages: int | None = None


def shape_of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
