"""What is known of a candidate, and which one wins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Share of the hot loop's bundles that may store a spilled register.
MOST_SPILLING = 0.05
# Costs that differ by less are equal.
TOLERANCE = 0.01
# And bundles of equal costs: they are hidden behind the bytes.
BUNDLES_TOLERANCE = 0.05


@dataclass(frozen=True)
class Trial:
    """A candidate, and what compiling or timing it gave.

    Fields:
      cost: predicted cycles or measured microseconds of the class's call; bundles and spilling only where predicted.
      error: why it cannot be used (its blocks do not fit the memory of the kernel); all else is 0 then.
    """

    blocks: dict[str, Any]
    cost: float = 0.0
    bundles: int = 0
    spilling: float = 0.0
    error: str = ""


def winner(trials: Sequence[Trial]) -> Trial | None:
    """Of those that spill in at most MOST_SPILLING (of all, where none does) the one with the least cost; of equal ones
    those with hardly more than the fewest bundles, and of these the last. None where no candidate works.
    """
    working = [trial for trial in trials if not trial.error]
    calm = [trial for trial in working if trial.spilling <= MOST_SPILLING] or working
    least = min((trial.cost for trial in calm), default=0.0)
    equal = [trial for trial in calm if trial.cost <= least * (1 + TOLERANCE)]
    few = min((trial.bundles for trial in equal), default=0) * (1 + BUNDLES_TOLERANCE)
    return next((trial for trial in reversed(equal) if trial.bundles <= few), None)


def table(trials: Sequence[Trial], unit: str, best: Trial | None) -> list[str]:
    """A line a candidate, the winner marked. unit: of the costs."""
    return [f"  {'*' if trial is best else ' '} {_text(trial, unit)}" for trial in trials]


def _text(trial: Trial, unit: str) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in trial.blocks.items())
    if trial.error:
        return f"{blocks}: skipped, {trial.error}"
    bundles = f", {trial.bundles:,} bundles, {trial.spilling:.1%} of the hot loop's spill" if trial.bundles else ""
    return f"{blocks}: {trial.cost:,.0f} {unit}{bundles}"
