"""What decode rounds take, from what was measured at start and from what steps take in service. No jax here.

A start may be unlucky (in nine starts on one CPU the same plain round came out at 1.0 to 2.4 ms), and contexts grow.
What counts for drafting is one ratio, a round with proposals over a plain one, and it is corrected where a plain step
and one with proposals follow each other: a machine that is slow for both changes nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxinfer.types import SamplerForm


@dataclass(frozen=True, slots=True)
class RoundSeconds:
    """What a round takes: without proposals, with one a row, and with the most."""

    plain: float
    one: float
    most: float

    def of(self, length: int, most: int) -> float:
        """With so many proposals a row, 0 to `most`."""
        if not length:
            return self.plain
        return self.one + (self.most - self.one) / max(most - 1, 1) * (length - 1)


type Seconds = Mapping[SamplerForm, Mapping[int, RoundSeconds]]
"""By sampler and number of rows that programs are compiled for, smallest first."""

START_WEIGHT, REMEMBERED = 2.0, 16.0
"""Comparisons that the measurement at start is worth, and those that are remembered."""
FURTHEST = 3.0
"""Times that a single comparison may differ from what is known: a step that waited for something else says nothing."""
FIRST_CHECK, RAREST_CHECK = 8, 128
"""Steps with proposals after which plain ones are due, if there were none: twice as many each time. Every plain step
that would have had proposals loses what they bring, and a draft model has to catch up with it.
"""
CHECK_STEPS = 2
"""At most: the next step is planned before the first has been read."""


@dataclass(slots=True)
class ProgramClock:
    """Of the programs for so many rows. at_start: as measured. seconds: as corrected by `weight` comparisons. drafting:
    steps with proposals planned since the last plain one; check: after so many a plain one is due.
    """

    at_start: RoundSeconds
    seconds: RoundSeconds
    factor: float = 1.0
    weight: float = START_WEIGHT
    drafting: int = 0
    check: int = FIRST_CHECK

    def had_plain(self) -> None:
        if self.drafting > self.check:
            self.check = min(2 * self.check, RAREST_CHECK)
        self.drafting = 0

    def correct(self, factor: float) -> None:
        """factor: of rounds with proposals over what was measured, plain ones as long as measured."""
        factor = min(max(factor, self.factor / FURTHEST), self.factor * FURTHEST)
        self.weight = min(self.weight + 1.0, REMEMBERED)
        self.factor *= (factor / self.factor) ** (1 / self.weight)
        start = self.at_start
        self.seconds = RoundSeconds(start.plain, start.one * self.factor, start.most * self.factor)


class TimedStep(NamedTuple):
    """lengths: of its rounds, the most proposals of a row. seconds: of all of them."""

    program: ProgramClock
    drafts: bool
    lengths: list[int]
    seconds: float

    def over_start(self, most: int) -> float:
        """Its seconds over what its rounds took at start."""
        return self.seconds / sum(self.program.at_start.of(length, most) for length in self.lengths)


class RoundClock:
    """most: proposals of a row in a round. seconds: as measured at start."""

    def __init__(self, most: int, seconds: Seconds):
        self._most = most
        self._programs = {form: {size: ProgramClock(found, found) for size, found in by_size.items()}
                          for form, by_size in seconds.items()}  # fmt: skip
        self._before: TimedStep | None = None

    def seconds(self, form: SamplerForm, num_rows: int) -> RoundSeconds:
        """Of the smallest program that holds the rows."""
        return self._program(form, num_rows).seconds

    def is_check_due(self, form: SamplerForm, num_rows: int) -> bool:
        """Asked for each step that is worth proposals: whether it should have none, to compare it with the others."""
        program = self._program(form, num_rows)
        if program.drafting == program.check + CHECK_STEPS:  # they could not be timed
            program.had_plain()
        program.drafting += 1
        return program.drafting > program.check

    def add(self, form: SamplerForm, num_rows: int, lengths: list[int], seconds: float) -> None:
        """A step took `seconds` from the end of the one before to its own, for rounds with so many proposals a row."""
        step = TimedStep(self._program(form, num_rows), any(lengths), lengths, seconds)
        before, self._before = self._before, step
        if not step.drafts:
            step.program.had_plain()
        if before is not None and before.program is step.program and before.drafts != step.drafts:
            drafting, plain = (step, before) if step.drafts else (before, step)
            step.program.correct(drafting.over_start(self._most) / plain.over_start(self._most))

    def skip(self) -> None:
        """A step that says nothing: what comes next has nothing to be compared with."""
        self._before = None

    def _program(self, form: SamplerForm, num_rows: int) -> ProgramClock:
        programs = self._programs[form]
        return programs[program_for(num_rows, programs)]


def program_for(num_rows: int, sizes: Iterable[int]) -> int:
    """The smallest that holds the rows."""
    return next(size for size in sizes if size >= num_rows)
