"""How many tokens are drafted for each row: as many as its acceptance pays for at the present load, down to none.

Where each proposal is kept with chance a, a round of k of them brings 1 + a + .. + a^k tokens (Leviathan et al. 2023,
arXiv:2211.17192, section 3.3). What a round takes is measured at start for each number of rows, so the best k is known
before anything is drafted. No jax here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.acceptance_rate import AcceptanceRate
from jaxinfer.config import EngineConfig
from jaxinfer.sequence import Sequence
from jaxinfer.types import SamplerForm, StepPlan, StepResult

PRIOR, PRIOR_WEIGHT = 0.7, 4.0
"""Chance that a proposal is kept before anything was seen, and the proposals that this is worth."""
ROW_WEIGHT = 8.0
"""Proposals that the acceptance of all rows is worth when a row's own is judged."""
REMEMBERED_OF_ROW, REMEMBERED_OF_ALL = 64.0, 4096.0
"""Proposals after which older ones count half."""
GAIN = 1.05
"""Drafting must promise so much more than plain decoding: what was measured at start is off by a few percent."""
LEAST_CHANCE = 0.05
"""A proposal that is reached and kept more rarely is not made."""
MOST_MISSED = 16
"""Tokens of a row that the draft model may not have seen. With more it says little that fits: the row stays plain."""
ROUNDS_BEFORE_PROBE, ROUNDS_OF_PROBE = 1000, 8
"""While only bad acceptance speaks against drafting, it is tried again that often: it costs 1 % at most."""


@dataclass(frozen=True, slots=True)
class RoundSeconds:
    """What a round takes: without proposals, with one a row, and with the most."""

    plain: float
    one: float
    most: float


type Seconds = Mapping[SamplerForm, Mapping[int, RoundSeconds]]
"""By sampler, of GREEDY and SIMPLE, and number of rows that programs are compiled for, smallest first."""


class DraftLengths:
    """Sets `Sequence.num_drafted` before a decode step and learns from what came of it.

    most: proposals of a row in a round. seconds: None drafts the most always.
    """

    def __init__(self, most: int, seconds: Seconds | None = None):
        self.most = most
        self._seconds = seconds
        self._all = AcceptanceRate()
        self._plain_rounds = 0
        self._probe_rounds = 0

    @staticmethod
    def of(config: EngineConfig) -> "DraftLengths | None":
        """For an engine whose rounds were not measured; None for one that does not speculate."""
        return DraftLengths(config.num_speculative_tokens) if config.num_speculative_tokens else None

    def choose(self, rows: list[Sequence], rounds: int) -> None:
        """For a step of so many rounds."""
        if self._seconds is None:
            for seq in rows:
                seq.num_drafted = self.most
        else:
            form = max(min(seq.form, SamplerForm.SIMPLE) for seq in rows)
            self._choose_by(seconds_of(self._seconds[form], len(rows)), rows, rounds)

    def _choose_by(self, seconds: RoundSeconds, rows: list[Sequence], rounds: int) -> None:
        able = [seq for seq in rows if seq.missed <= MOST_MISSED]
        overall = self._all.chance(PRIOR, PRIOR_WEIGHT)
        chances = [seq.acceptance.chance(overall, ROW_WEIGHT) for seq in able]
        length = self._best(seconds, chances, len(rows))
        if not length and able and self._may_probe():
            chances = [1.0] * len(able)
            length = self._best(seconds, chances, len(rows))
            self._probe_rounds -= rounds
        for seq in rows:
            seq.num_drafted = 0
        for seq, chance in zip(able, chances, strict=True):
            seq.num_drafted = min(length, worth_making(chance, self.most))
        if not length:
            self._plain_rounds += rounds

    def _may_probe(self) -> bool:
        if self._probe_rounds <= 0 and self._plain_rounds >= ROUNDS_BEFORE_PROBE:
            self._plain_rounds, self._probe_rounds = 0, ROUNDS_OF_PROBE
        return self._probe_rounds > 0

    def _best(self, seconds: RoundSeconds, chances: list[float], num_rows: int) -> int:
        """The number of proposals with most tokens a second; 0 unless that is clearly more than without."""
        others = num_rows - len(chances)
        best, best_rate = 0, GAIN * num_rows / seconds.plain
        for length in range(1, self.most + 1):
            step = (seconds.most - seconds.one) / max(self.most - 1, 1)
            rate = (others + sum(tokens_a_round(chance, length) for chance in chances)) / (
                seconds.one + step * (length - 1))
            if rate > best_rate:
                best, best_rate = length, rate
        return best

    def learn(self, rows: list[Sequence], plan: StepPlan, result: StepResult) -> None:
        """From a decode step. A row's last round is cut where the row ends; that counts as a proposal not kept."""
        if not any(plan.num_drafted):  # only then the draft model does not run
            for seq, counts in zip(rows, result.round_counts, strict=False):
                seq.missed += len(counts)
            return
        for seq, num_drafted, counts in zip(rows, plan.num_drafted, result.round_counts, strict=True):
            if num_drafted:
                kept = sum(counts) - len(counts)
                judged = kept + sum(count <= num_drafted for count in counts)
                seq.acceptance.add(judged, kept, REMEMBERED_OF_ROW)
                self._all.add(judged, kept, REMEMBERED_OF_ALL)


def seconds_of(by_size: Mapping[int, RoundSeconds], num_rows: int) -> RoundSeconds:
    """Of the smallest program that holds the rows."""
    return next(seconds for size, seconds in by_size.items() if size >= num_rows)


def tokens_a_round(chance: float, length: int) -> float:
    """1 + a + .. + a^k."""
    return sum(chance**i for i in range(length + 1))


def worth_making(chance: float, most: int) -> int:
    """Proposals up to the last that is reached and kept with LEAST_CHANCE."""
    return next((length for length in range(most) if chance ** (length + 1) < LEAST_CHANCE), most)


def table(seconds: Seconds, most: int) -> str:
    """For a person."""
    lines = [f"  {'':<20}{'plain':>8}{'1 drafted':>12}{f'{most} drafted':>12}"]
    for form, by_size in seconds.items():
        for size, found in by_size.items():
            name = f"{form.name.lower()}, {size} rows"
            lines.append(f"  {name:<20}{found.plain * 1e3:>8.2f}{found.one * 1e3:>12.2f}{found.most * 1e3:>12.2f}")
    return "\n".join(lines)
