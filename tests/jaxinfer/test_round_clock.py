"""What rounds take in service: against a machine whose rounds are known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.draft_lengths import lengths_of_rounds
from jaxinfer.round_clock import RoundClock, RoundSeconds
from jaxinfer.types import SamplerForm, StepKind, StepPlan, StepResult

MOST = 4
START = RoundSeconds(1.0, 2.0, 3.5)
GREEDY, SIMPLE = SamplerForm.GREEDY, SamplerForm.SIMPLE


def new_clock() -> RoundClock:
    return RoundClock(MOST, {form: {2: START, 8: START} for form in SamplerForm})


def ratio_of(clock: RoundClock, num_rows: int = 1) -> float:
    found = clock.seconds(GREEDY, num_rows)
    return found.most / found.plain


@given(st.floats(0.5, 2.0), st.lists(st.floats(0.2, 5.0), min_size=80, max_size=80))
def test_it_finds_the_ratio_whatever_the_machine_does_to_both(factor, speeds):
    """Pairs of a plain step and one with proposals, each pair at another speed."""
    clock = new_clock()
    for speed in speeds:
        clock.skip()
        clock.add(GREEDY, 1, [0] * 8, 8 * speed)
        clock.add(GREEDY, 1, [MOST] * 8, 8 * speed * START.most * factor)
    assert ratio_of(clock) == pytest.approx(START.most * factor, rel=0.02)
    assert ratio_of(clock, 8) == START.most, "of another program nothing is known"


def test_a_step_that_waited_for_something_else_counts_little():
    clock = new_clock()
    for _ in range(40):
        clock.add(GREEDY, 1, [0] * 8, 8.0)
        clock.add(GREEDY, 1, [MOST] * 8, 8 * START.most)
    clock.add(GREEDY, 1, [0] * 8, 8000.0)
    assert ratio_of(clock) == pytest.approx(START.most, rel=0.1)


def test_only_steps_of_one_program_that_follow_each_other_are_compared():
    clock = new_clock()
    for between in (clock.skip, lambda: clock.add(SIMPLE, 1, [0], 1.0), lambda: clock.add(GREEDY, 8, [0], 1.0)):
        clock.add(GREEDY, 1, [0], 1.0)
        between()
        clock.add(GREEDY, 1, [MOST], 100.0)
        clock.add(GREEDY, 1, [MOST], 1.0)
        clock.skip()
    assert ratio_of(clock) == START.most


def test_rounds_in_which_a_drafter_declines_are_plain_ones():
    """Five of eight rounds had proposals, two of them one: what the step takes is known, so nothing is corrected."""
    clock = new_clock()
    clock.add(GREEDY, 1, [0] * 8, 8.0)
    clock.add(GREEDY, 1, [4, 4, 4, 1, 1, 0, 0, 0], 3 * START.most + 2 * START.one + 3)
    assert ratio_of(clock) == pytest.approx(START.most)


def test_lengths_of_the_rounds_that_ran():
    plan = StepPlan(0, StepKind.DECODE, 3, GREEDY, (0, 1), ((), ()), (4, 4), (True, True), num_drafted=(2, 1))
    result = StepResult([[1] * 4, [1]], round_counts=[[1, 2, 1], [1]], made_counts=[[0, 2, 1], [1]])
    assert lengths_of_rounds(plan, result) == [1, 2, 1]
    plain = StepPlan(0, StepKind.DECODE, 3, GREEDY, (0, 1), ((), ()), (4, 4), (True, True))
    assert lengths_of_rounds(plain, StepResult([[1, 1, 1], [1]])) == [0, 0, 0]
    assert lengths_of_rounds(plain, StepResult([[1, 1], [1]])) == [0, 0]
