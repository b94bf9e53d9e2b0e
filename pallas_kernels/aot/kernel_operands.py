"""The scalar operands with which a function calls its Pallas kernels, where they follow from known arguments.

A kernel's lengths and work lists are often computed by XLA from the caller's arrays. This evaluates a traced function
as far as values are known and leaves the rest, pages and activations, without values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "core_call")
# Values larger than this are pages or activations that somebody made inside; no kernel's lengths are.
MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class KernelCall:
    """name: of the `pallas_call`; operands: in order, None where the value is not known."""

    name: str
    operands: tuple[np.ndarray | None, ...]

    def known(self) -> dict[int, np.ndarray]:
        """By index the operands that are integers with a value."""
        return {index: value for index, value in enumerate(self.operands)
                if value is not None and np.issubdtype(value.dtype, np.integer)}  # fmt: skip


def kernel_calls(function: Callable[..., Any], *arguments: Any, mesh: jax.sharding.Mesh) -> list[KernelCall]:
    """The calls of kernels in the order they are made.

    Args:
      function: as for `jax.jit`; traced for the devices of `mesh`, evaluated on the CPU.
      arguments: arrays where the value matters, `jax.ShapeDtypeStruct` elsewhere.

    Raises:
      ValueError: for a loop around a kernel, or a branch that does not follow from the known values.
    """
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(function)(*arguments)
    values = [
        None if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf) for leaf in jax.tree.leaves(arguments)
    ]
    found: list[KernelCall] = []
    _evaluate(jaxpr.jaxpr, jaxpr.consts, values, found)
    return found


def _evaluate(jaxpr: Any, consts: Any, arguments: list[Any], found: list[KernelCall]) -> list[Any]:
    """The results of a jaxpr, None where unknown."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        results = _apply(equation, [read(atom) for atom in equation.invars], found)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, inputs: list[Any], found: list[KernelCall]) -> list[Any]:
    """The results of one equation; calls of kernels are noted and have none."""
    name, parameters = equation.primitive.name, equation.params
    unknown = [None] * len(equation.outvars)
    if name == "pallas_call":
        operands = tuple(None if value is None else np.asarray(value) for value in inputs)
        found.append(KernelCall(str(parameters.get("name") or parameters["name_and_src_info"]), operands))
        return unknown
    if name == "cond" and _has_kernel(equation):
        if inputs[0] is None:
            raise ValueError("a kernel is called under a condition that does not follow from the known arguments")
        branch = parameters["branches"][int(np.clip(inputs[0], 0, len(parameters["branches"]) - 1))]
        return _evaluate(branch.jaxpr, branch.consts, inputs[1:], found)
    if name in INLINED:
        inner = parameters.get("jaxpr") or parameters.get("call_jaxpr")
        closed = inner if hasattr(inner, "consts") else None
        return _evaluate(closed.jaxpr if closed else inner, closed.consts if closed else [], inputs, found)
    if _has_kernel(equation):
        raise ValueError(f"a kernel is called inside {name}: its calls cannot be listed one by one")
    too_large = any(variable.aval.size > MAX_ELEMENTS for variable in equation.outvars)
    if too_large or any(value is None for value in inputs):
        return unknown
    results = equation.primitive.bind(*inputs, **parameters)
    return list(results) if equation.primitive.multiple_results else [results]


def _has_kernel(equation: Any) -> bool:
    return any(inner.primitive.name == "pallas_call" for inner in _inner_equations(equation))


def _inner_equations(equation: Any) -> Iterator[Any]:
    for parameter in equation.params.values():
        for jaxpr in parameter if isinstance(parameter, tuple | list) else (parameter,):
            for inner in getattr(getattr(jaxpr, "jaxpr", jaxpr), "eqns", ()):
                yield inner
                yield from _inner_equations(inner)
