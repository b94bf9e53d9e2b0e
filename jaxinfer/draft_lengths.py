"""How many tokens are drafted for each row: as many as its acceptance pays for at the present load, down to none.

Where each proposal is kept with chance a, a round of k of them brings 1 + a + .. + a^k tokens (Leviathan et al. 2023,
arXiv:2211.17192, section 3.3). What a round takes is measured at start for each number of rows, so the best k is known
before anything is drafted, and corrected in service (`round_clock`). A drafter may decline (prompt lookup without a
match): rounds count in which any row had a proposal, and in those a row's proposals count as often as it had some. No
jax here.
"""

import math
from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

from jaxinfer.acceptance_rate import AcceptanceRate
from jaxinfer.config import EngineConfig
from jaxinfer.round_clock import RoundClock, RoundSeconds, Seconds
from jaxinfer.sequence import Sequence
from jaxinfer.types import SamplerForm, StepKind, StepPlan, StepResult

PRIOR, PRIOR_WEIGHT = 0.7, 4.0
"""Chance that a proposal is kept before anything was seen, and the proposals that this is worth."""
ROW_WEIGHT = 8.0
"""Proposals that the acceptance of all rows is worth when a row's own is judged."""
REMEMBERED_OF_ROW, REMEMBERED_OF_ALL = 64.0, 512.0
"""Proposals after which older ones count half."""
GAIN = 1.05
"""Drafting must promise so much more than plain decoding, for what was measured at start is not exact."""
LEAST_CHANCE = 0.05
"""A proposal that is reached and kept more rarely is not made."""
PROBE_SHARE = 0.01
"""Of the time: what trying again may cost while only bad acceptance speaks against drafting."""
PROBE_STEPS = 2
"""Steps of a probe: the next is planned before the first has been read."""
RESTING = 64
"""Plain rounds for which a no stands while the rows and the sampler stay: what it follows from hardly changes in them.
"""
PROBE_ROWS = 128
"""Of so many rows that begin where only bad acceptance speaks against drafting, the drafter sees one. It computes its
whole step: to a draft model an eighth of its target's size, one of 32 steps of four prompts is under half a percent.
"""


class CatchUp(NamedTuple):
    """What it takes to have the drafter compute so many tokens that it was not shown."""

    tokens: int
    seconds: float


class Judged(NamedTuple):
    """A row's round that wanted proposals. known: whether no stop id cut it, behind which nothing is judged."""

    made: int
    kept: int
    known: bool


class No(NamedTuple):
    """An answer: no proposals for so many rows with this sampler. until: plain rounds up to which it stands."""

    form: SamplerForm
    num_rows: int
    until: int


class DraftLengths:
    """Sets `Sequence.num_drafted` before a decode step and learns from what came of it.

    most: proposals of a row in a round. seconds: None drafts the most always. catch_up: of a drafter to which prompts
    are work; None for others, which see all rows.
    """

    def __init__(self, most: int, seconds: Seconds | None = None, catch_up: CatchUp | None = None):
        self.most = most
        self._clock = None if seconds is None else RoundClock(most, seconds)
        self._catch_up = catch_up
        self._unseen = 0  # rows begun since the last that the drafter sees
        self._all = AcceptanceRate()
        self._making = AcceptanceRate()  # of rounds that wanted proposals, those that had any
        self._plain_rounds = 0  # since the last step with proposals
        self._no: No | None = None

    @staticmethod
    def of(config: EngineConfig) -> "DraftLengths | None":
        """For an engine whose rounds were not measured; None for one that does not speculate."""
        return DraftLengths(config.num_speculative_tokens) if config.num_speculative_tokens else None

    def watches(self, seq: Sequence, num_rows: int, num_unseen: int) -> bool:
        """Whether the drafter is to compute the prompt of a row that begins now as one of so many: whether proposals
        for all of them would pay for it, and for the row's first `num_unseen` tokens, which it has to catch up with.
        """
        self.wake()
        if self._clock is None or self._catch_up is None:
            return True
        seconds = self._clock.seconds(seq.form, num_rows)
        chance = seq.acceptance.chance(self._all.chance(PRIOR, PRIOR_WEIGHT), ROW_WEIGHT)
        rounds, missing = num_drafting(seq) / num_rows, self._catching_up(num_unseen) + self._beside(seq)
        watched = self._saved(seconds, chance) * rounds > missing
        if not watched and self._unseen >= PROBE_ROWS - 1:  # what is acceptance now?
            watched = self._saved(seconds, 1.0) * rounds > missing
        self._unseen = 0 if watched else self._unseen + 1
        return watched

    def late(self, rows: list[Sequence], rounds: int) -> list[Sequence]:
        """Of decode rows those that the drafter is behind with and should catch up with now: drafting has come to pay,
        or one, if it is time to try. rounds: of a step that would draft.
        """
        behind = [seq for seq in rows if not self._follows(seq)]
        if not behind or self._clock is None or self._catch_up is None:
            return []
        seconds = self._clock.seconds(max(seq.form for seq in rows), len(rows))
        cost, best_of_all = costs_of(seconds, self.most)
        if not best_of_all:
            return []
        saved = self._saved(seconds, self._all.chance(PRIOR, PRIOR_WEIGHT)) / len(rows)
        if late := self._worth_catching_up(behind, saved):
            followed = [*late, *(seq for seq in rows if self._follows(seq))]
            if self._length(cost, followed, self._chances(followed), len(rows)):  # or `choose` would say no each time
                return late
        if len(behind) < len(rows):  # those that the drafter follows tell what acceptance is now
            return []
        row = min(behind, key=num_behind)
        spent = PROBE_STEPS * rounds * (cost[best_of_all] - 1) + self._catching_up(num_behind(row)) / seconds.plain
        return [row] if num_drafting(row) and self._plain_rounds * PROBE_SHARE >= spent else []

    def _worth_catching_up(self, behind: list[Sequence], saved: float) -> list[Sequence]:
        """saved: seconds of a row's share of a round."""
        if not saved:
            return []
        chances = self._chances(behind)
        return [seq for seq, chance in zip(behind, chances, strict=True)
                if worth_making(chance, self.most) and saved * num_drafting(seq) > self._catching_up(num_behind(seq))]

    def _follows(self, seq: Sequence) -> bool:
        """Whether the drafter has all of the row that it needs."""
        return seq.watched and (seq.seen is None or self._catch_up is None)

    def _saved(self, seconds: RoundSeconds, chance: float) -> float:
        """Seconds of a plain round that drafting spares; 0 where it does not pay."""
        cost, _ = costs_of(seconds, self.most)
        length = best_length(cost, [chance], [1.0])
        rate = sum(chance**i for i in range(length + 1)) / cost[length]
        return seconds.plain * (1 - 1 / rate)

    def _catching_up(self, num_tokens: int) -> float:
        """Seconds."""
        chunk = self._catch_up or CatchUp(1, 0.0)
        return math.ceil(num_tokens / chunk.tokens) * chunk.seconds

    def _beside(self, seq: Sequence) -> float:
        """Seconds of the drafter's part in the prefill of what is not cached: its share of a chunk, as others fill the
        step with it.
        """
        chunk = self._catch_up or CatchUp(1, 0.0)
        return seq.num_uncomputed / chunk.tokens * chunk.seconds

    def choose(self, rows: list[Sequence], rounds: int, form: SamplerForm, ready: Collection[Sequence] = ()) -> None:
        """For a step of so many rounds with this sampler. ready: rows that the drafter will have caught up with."""
        if self._clock is None:
            for seq in rows:
                seq.num_drafted = self.most
            return
        for seq in rows:
            seq.num_drafted = 0
        followed = [seq for seq in rows if self._follows(seq) or seq in ready]
        cost, best_of_all = costs_of(self._clock.seconds(form, len(rows)), self.most)
        possible = best_of_all if followed else 0  # whatever is kept
        chances = self._chances(followed)
        length = self._length(cost, followed, chances, len(rows)) if possible else 0
        if length:
            if self._clock.is_check_due(form, len(rows)):
                return
        elif possible and self._plain_rounds * PROBE_SHARE >= PROBE_STEPS * rounds * (cost[possible] - 1):
            length, chances = possible, [1.0] * len(followed)
        else:
            self._no = No(form, len(rows), self._plain_rounds + RESTING)
            return
        for seq, chance in zip(followed, chances, strict=True):
            seq.num_drafted = min(length, worth_making(chance, self.most))

    def rests(self, form: SamplerForm, num_rows: int) -> bool:
        """Whether the last answer, for as many rows with this sampler, was no, and still is: then none is asked for."""
        no = self._no
        return no is not None and (no.form, no.num_rows) == (form, num_rows) and self._plain_rounds < no.until

    def wake(self) -> None:
        """What a no follows from has changed."""
        self._no = None

    def _chances(self, rows: list[Sequence]) -> list[float]:
        overall = self._all.chance(PRIOR, PRIOR_WEIGHT)
        return [seq.acceptance.chance(overall, ROW_WEIGHT) for seq in rows]

    def _length(self, cost: list[float], followed: list[Sequence], chances: list[float], num_rows: int) -> int:
        """Proposals that are best for a step of so many rows, of which the drafter follows some."""
        others = [0.0] * (num_rows - len(followed))
        return best_length(cost, chances + others, self._shares(followed) + others)

    def _shares(self, rows: list[Sequence]) -> list[float]:
        """Of the rounds in which any of the rows has proposals, those in which each has."""
        overall = self._making.chance(1.0, PRIOR_WEIGHT)
        made = [seq.making.chance(overall, ROW_WEIGHT) for seq in rows]
        any_made = 1.0 - math.prod(1.0 - one for one in made)
        return [one / any_made for one in made]

    def learn(self, rows: list[Sequence], plan: StepPlan, result: StepResult) -> list[Judged]:
        """From a step, before its rows take in their tokens; the rounds with proposals."""
        if plan.num_drafted:
            self._plain_rounds = 0
            self.wake()
        elif plan.num_decode_rows == len(rows):  # beside rows with a grammar such a step is of the kind PREFILL
            if not self._plain_rounds:  # behind steps with proposals: now it is known what they take
                self.wake()
            self._plain_rounds += plan.num_rounds
        if self._clock is not None:
            self._time(self._clock, plan, result)
        found: list[Judged] = []
        for seq, num_drafted, counts, made, ids in zip(rows, plan.num_drafted, result.round_counts, result.made_counts,
                                                       result.tokens, strict=False):
            if not seq.finished:
                judged = judged_rounds(seq, num_drafted, counts, made, ids)
                for one in judged:
                    self._learn_round(seq, one)
                found += [one for one in judged if one.made]
        return found

    def _time(self, clock: RoundClock, plan: StepPlan, result: StepResult) -> None:
        """Steps whose rounds all ran, with nothing beside them."""
        seconds = result.seconds
        if seconds is None or plan.kind is not StepKind.DECODE or plan.constrained or plan.caught_up:
            clock.skip()
            return
        lengths = lengths_of_rounds(plan, result)
        if len(lengths) == plan.num_rounds:
            clock.add(plan.sampler, len(plan.slots), lengths, seconds)
        else:
            clock.skip()

    def _learn_round(self, seq: Sequence, round_: Judged) -> None:
        seq.making.add(1, round_.made > 0, REMEMBERED_OF_ROW)
        self._making.add(1, round_.made > 0, REMEMBERED_OF_ALL)
        judged = round_.kept + (round_.known and round_.kept < round_.made)
        seq.acceptance.add(judged, round_.kept, REMEMBERED_OF_ROW)
        self._all.add(judged, round_.kept, REMEMBERED_OF_ALL)


def judged_rounds(seq: Sequence, num_drafted: int, counts: list[int], made_counts: list[int], ids: list[int]
                  ) -> list[Judged]:  # fmt: skip
    """A row's rounds that wanted proposals, from the tokens of each and the proposals that were made. The device
    proposes nothing beyond the row's end.
    """
    left, found = left_of(seq), []
    for index, (count, made) in enumerate(zip(counts, made_counts, strict=True)):
        wanted = min(num_drafted, left - 1)
        left -= count
        if wanted > 0:
            stopped = index == len(counts) - 1 and ids[-1] in seq.stop_ids
            found.append(Judged(made, min(count - 1, made), not stopped))
    return found


def lengths_of_rounds(plan: StepPlan, result: StepResult) -> list[int]:
    """Most proposals of a row in each round that ran."""
    if not plan.num_drafted:
        return [0] * max(map(len, result.tokens), default=0)
    rounds = max(map(len, result.made_counts), default=0)
    return [max((made[index] for made in result.made_counts if index < len(made)), default=0)
            for index in range(rounds)]


@lru_cache(maxsize=64)
def costs_of(seconds: RoundSeconds, most: int) -> tuple[list[float], int]:
    """Of a round with 0, 1, .. `most` proposals a row, in plain rounds; and the best number if all were kept, whatever
    the number of rows. Asked in every step.
    """
    cost = [seconds.of(length, most) / seconds.plain for length in range(most + 1)]
    return cost, best_length(cost, [1.0], [1.0])


def best_length(cost: list[float], chances: list[float], shares: list[float]) -> int:
    """The number of proposals with most tokens a second; 0 unless that is clearly more than without.

    cost: of a round with 0, 1, .. proposals a row, in plain rounds. chances: of each row. shares: of such rounds, in
    which each row has proposals.
    """
    best, best_rate = 0, GAIN * len(chances)
    tokens, reached = float(len(chances)), [share * chance for share, chance in zip(shares, chances, strict=True)]
    for length in range(1, len(cost)):
        tokens += sum(reached)
        if tokens / cost[length] > best_rate:
            best, best_rate = length, tokens / cost[length]
        reached = [one * chance for one, chance in zip(reached, chances, strict=True)]
    return best


def left_of(seq: Sequence) -> int:
    """Tokens that the row may still say."""
    return seq.end + 1 - len(seq.tokens)


def num_behind(seq: Sequence) -> int:
    """Tokens that the drafter has to compute before it may propose for a row that it does not follow."""
    return len(seq.tokens) - (seq.seen or 0)


def num_drafting(seq: Sequence) -> int:
    """Of them those that proposals may bring: not the one that prefill samples, nor the last."""
    return max(left_of(seq) - 2, 0)


def worth_making(chance: float, most: int) -> int:
    """Proposals up to the last that is reached and kept with LEAST_CHANCE."""
    if chance >= LEAST_CHANCE ** (1 / most):
        return most
    return int(math.log(LEAST_CHANCE) / math.log(chance)) if chance > 0 else 0


def table(seconds: Seconds, most: int) -> str:
    """For a person."""
    lines = [f"  {'':<20}{'plain':>8}{'1 drafted':>12}{f'{most} drafted':>12}"]
    for form, by_size in seconds.items():
        for size, found in by_size.items():
            name = f"{form.name.lower()}, {size} rows"
            lines.append(f"  {name:<20}{found.plain * 1e3:>8.2f}{found.one * 1e3:>12.2f}{found.most * 1e3:>12.2f}")
    return "\n".join(lines)
