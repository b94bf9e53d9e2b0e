"""How often a row's proposals were kept, older ones counting less. No jax here."""

from dataclasses import dataclass


@dataclass(slots=True)
class AcceptanceRate:
    """Proposals that were judged (those kept, and the first that was not), and those kept."""

    judged: float = 0.0
    kept: float = 0.0

    def add(self, judged: int, kept: int, remembered: float) -> None:
        """remembered: proposals after which older ones count half."""
        if self.judged > remembered:
            self.judged, self.kept = self.judged / 2, self.kept / 2
        self.judged += judged
        self.kept += kept

    def chance(self, prior: float, weight: float) -> float:
        """That a proposal is kept, where `prior` is worth `weight` proposals."""
        return (self.kept + prior * weight) / (self.judged + weight)
