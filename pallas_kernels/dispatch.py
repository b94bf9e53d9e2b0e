"""Choosing an implementation of an operation: explicit, ordered and loud.

An operation has an ordered tuple of implementations. Each says, for a description of the call (the operation's frozen
`spec`), every reason why it cannot serve it, and every reason why another one is the better default although it can.
Nothing is cached or global: the same spec gives the same choice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax


class Candidate(Protocol):
    """What choosing needs to know of an implementation."""

    @property
    def name(self) -> str: ...

    @property
    def automatic(self) -> bool:
        """False for implementations that only a caller who names them gets (the slow reference)."""
        ...

    @property
    def unsupported_reasons(self) -> Callable[[Any], list[str]]:
        """Every reason why a call described by the operation's spec cannot be served; empty when it can."""
        ...

    @property
    def yielding_reasons(self) -> Callable[[Any], list[str]]:
        """Why, although it can serve such a call, the next one that can is the default; empty when it is not so."""
        ...


def no_reasons(spec: Any) -> list[str]:
    """For implementations that never yield."""
    return []


def host_reasons(traced: bool) -> list[str]:
    """For implementations in NumPy."""
    return ["computes with concrete arrays on the host, not inside a compiled program"] if traced else []


@dataclass(frozen=True)
class Verdict:
    """One line of `explain`: an implementation, whether it is the choice, and why not if it cannot serve or yields."""

    implementation: str
    chosen: bool
    reasons: tuple[str, ...]


class Unsupported(Exception):
    """No implementation (or not the named one) can serve a call. `reasons` maps each name to all of its reasons."""

    def __init__(self, operation: str, reasons: Mapping[str, Sequence[str]], named: str | None = None):
        self.operation = operation
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        lines = [f"  {name}: {'; '.join(why) or 'only by name'}" for name, why in self.reasons.items()]
        who = "no implementation can" if named is None else f"{named} cannot"
        super().__init__("\n".join([f"{operation}: {who} serve this call", *lines]))


def choose[Implementation: Candidate](
    operation: str, candidates: Sequence[Implementation], spec: Any, implementation: str | None = None
) -> Implementation:
    """The named implementation, or the first automatic one that supports `spec` and does not yield.

    Raises:
      ValueError: `implementation` is no candidate's name.
      Unsupported: the named one cannot serve the call, or every automatic one cannot or yields.
    """
    named = implementation is not None
    if named:
        by_name = {candidate.name: candidate for candidate in candidates}
        if implementation not in by_name:
            raise ValueError(f"{operation}: implementation {implementation!r} is not one of {sorted(by_name)}")
        considered = [by_name[implementation]]
    else:
        considered = [candidate for candidate in candidates if candidate.automatic]
    reasons = {}
    for candidate in considered:
        reasons[candidate.name] = candidate.unsupported_reasons(spec) or reasons_to_yield(candidate, spec, named)
        if not reasons[candidate.name]:
            return candidate
    raise Unsupported(operation, reasons, implementation)


def reasons_to_yield(candidate: Candidate, spec: Any, named: bool) -> list[str]:
    return [] if named else [f"only by name here: {why}" for why in candidate.yielding_reasons(spec)]


def explain(candidates: Sequence[Candidate], spec: Any) -> tuple[Verdict, ...]:
    """What `choose(..., implementation=None)` would do with `spec` and why, one line an implementation."""
    verdicts: list[Verdict] = []
    for candidate in candidates:
        reasons = tuple(candidate.unsupported_reasons(spec) or reasons_to_yield(candidate, spec, named=False))
        chosen = candidate.automatic and not reasons and not any(verdict.chosen for verdict in verdicts)
        verdicts.append(Verdict(candidate.name, chosen, reasons or (() if candidate.automatic else ("only by name",))))
    return tuple(verdicts)


@dataclass(frozen=True)
class Device:
    """What calls are compiled for. platform: "cpu", "gpu" or "tpu"; kind: as jax names it ("TPU v6 lite")."""

    platform: str
    kind: str


def current_device() -> Device:
    """The devices of the mesh in use (`jax.set_mesh`), which need not exist here; else where a call would run."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        local = jax.local_devices()[0]
        return Device(local.platform, local.device_kind)
    return Device(platform_name(device.platform), device.device_kind)


def device_of(mesh: jax.sharding.Mesh | None) -> Device:
    """The devices of `mesh`, which need not exist here; without one, where a call would run."""
    if mesh is None:
        return current_device()
    device = mesh.devices.flat[0]
    return Device(platform_name(device.platform), device.device_kind)


def platform_name(platform: str) -> str:
    """One name for every maker of GPUs."""
    return "gpu" if platform in ("cuda", "rocm") else platform
