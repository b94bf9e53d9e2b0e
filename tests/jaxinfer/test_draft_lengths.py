"""How many tokens are drafted: against a search over what each choice would bring, and what stops and restarts it."""

import math

import pytest
from draft_teaching import (
    BURST,
    CHEAP,
    CHUNK,
    DEAR,
    MOST,
    STOP,
    chosen,
    lengths,
    sequences,
    teach,
    teach_often,
)
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import draft_lengths
from jaxinfer.draft_lengths import CatchUp, DraftLengths
from jaxinfer.round_clock import RoundClock, RoundSeconds
from jaxinfer.sequence import Sequence
from jaxinfer.types import SamplerForm, StepKind, StepPlan, StepResult


def test_without_measured_rounds_the_most_is_drafted():
    rows = sequences(3)
    assert chosen(DraftLengths(MOST), rows) == [MOST] * 3


def test_kept_proposals_lengthen_and_refused_ones_end_it():
    drafts, rows = lengths(CHEAP), sequences(2)
    assert 0 < chosen(drafts, rows)[0] <= MOST, "the prior is that drafting pays"
    teach_often(drafts, rows, [5] * 8, 5)
    assert chosen(drafts, rows) == [MOST] * 2
    teach_often(drafts, rows, [1] * 8, 40)
    assert chosen(drafts, rows) == [0] * 2


def test_each_row_has_its_own():
    drafts, rows = lengths(CHEAP), sequences(2)
    teach_often(drafts, rows[:1], [5] * 8, 5)
    teach_often(drafts, rows[1:], [1] * 8, 10)
    good, bad = chosen(drafts, rows)
    assert good == MOST and bad <= 1


def test_where_rounds_with_proposals_cannot_pay_there_are_none():
    drafts, rows = lengths(DEAR), sequences(3)
    teach(drafts, rows, [5] * 40)
    for _ in range(3000):
        assert chosen(drafts, rows) == [0] * 3, "not even to try"
        teach(drafts, rows, [1] * 8, num_drafted=0)


def test_short_answers_do_not_look_like_refused_proposals():
    """Nothing is proposed beyond a row's end, and nothing is known of what would have come behind a stop id."""
    drafts = lengths(CHEAP)
    for _ in range(100):
        (short,) = sequences(1, max_tokens=3)
        short.tokens += [7]
        teach(drafts, [short], [2])  # one proposal fits, and is kept
        (single,) = sequences(1, max_tokens=2)
        single.tokens += [7]
        teach(drafts, [single], [1])  # none fits
        teach(drafts, sequences(1), [2], last=STOP)  # a kept stop id
    assert chosen(drafts, sequences(1)) == [MOST]
    kept = draft_lengths.judged_rounds(sequences(1)[0], MOST, [5, 2], [MOST, MOST], [7] * 6 + [STOP])
    assert kept == [(4, 4, True), (4, 1, False)]


def test_rows_that_have_ended_teach_nothing():
    drafts, (row,) = lengths(CHEAP), sequences(1)
    row.finished = True
    teach_often(drafts, [row], [1] * 8, 100)
    assert row.acceptance.judged == 0 and chosen(drafts, sequences(1))[0] > 0


def test_bad_acceptance_is_tried_again_for_a_hundredth_of_the_time():
    drafts, spent, plain = lengths(CHEAP), 0.0, 0.0
    teach_often(drafts, sequences(1), [1] * 8, 400)
    before: list[int] = []
    for _ in range(4000):
        rows = sequences(2)
        length = chosen(drafts, rows)[0]
        if before:  # the step before is read when this one is planned already
            teach(drafts, sequences(2), [1] * 8, num_drafted=before.pop())
        before.append(length)
        spent, plain = spent + 8 * (0.4 if length else 0.0), plain + 8
    assert 0 < spent <= 0.011 * plain


def test_kept_probes_bring_it_back():
    drafts, rows = lengths(CHEAP), sequences(1)
    teach_often(drafts, sequences(1), [1] * 8, 400)
    for _ in range(1000):
        length = chosen(drafts, rows)[0]
        teach(drafts, rows, [length + 1] * 8, num_drafted=length)
        rows[0].tokens = rows[0].tokens[:2]
    assert chosen(drafts, rows) == [MOST]


def test_rows_that_go_on_alone_after_a_burst_draft_again():
    drafts, rows = DraftLengths(MOST, BURST), sequences(40)
    teach(drafts, rows, [5] * 8)
    assert chosen(drafts, rows) == [0] * 40
    teach_often(drafts, rows, [1] * 8, 20, num_drafted=0)
    assert chosen(drafts, rows[:4]) == [MOST] * 4


def test_prompts_are_computed_where_proposals_would_pay():
    drafts, (row,) = DraftLengths(MOST, BURST, CHUNK), sequences(1)
    assert drafts.watches(row, 4, 0) and not drafts.watches(row, 5, 0)
    teach_often(drafts, sequences(1), [1] * 8, 400)
    assert not drafts.watches(row, 4, 0), "nothing is kept"
    assert DraftLengths(MOST, BURST).watches(row, 40, 99), "a drafter to which prompts are no work sees all rows"
    assert DraftLengths(MOST).watches(row, 40, 99), "nothing is known of rounds"


def test_a_row_in_so_many_is_seen_to_learn_what_acceptance_is_now():
    drafts, (row,) = DraftLengths(MOST, BURST, CHUNK), sequences(1)
    teach_often(drafts, sequences(1), [1] * 8, 400)
    seen = [index for index in range(400) if drafts.watches(row, 4, 0)]
    assert seen == [draft_lengths.PROBE_ROWS * n - 1 for n in (1, 2, 3)]
    assert not any(drafts.watches(row, 40, 0) for _ in range(400)), "even kept whole, they would not pay"
    assert drafts.watches(row, 4, 0)


def test_catching_up_must_pay_for_itself():
    """CHEAP saves under a round of each token that is left; a chunk of 8 tokens takes 20 rounds of one row."""
    drafts = DraftLengths(MOST, BURST, CatchUp(8, 20.0))
    (long,), (short,) = sequences(1, max_tokens=500), sequences(1, max_tokens=30)
    assert drafts.watches(long, 1, 40) and not drafts.watches(long, 1, 4000)
    assert drafts.watches(short, 1, 0) and not drafts.watches(short, 1, 8)
    assert drafts.watches(long, 1, 64) and not drafts.watches(long, 4, 64), "a round is of four rows"
    teach_often(drafts, sequences(1), [1] * 8, 400)
    assert not drafts.watches(long, 1, 8)


def test_a_prompt_must_pay_for_itself():
    """A scored prompt, or one that is answered in a token or two, gives nothing to draft."""
    drafts = DraftLengths(MOST, BURST, CatchUp(256, 8.0))
    assert [drafts.watches(seq, 1, 0) for count in (1, 2, 9) for seq in sequences(1, max_tokens=count)] == [
        False, False, True]
    (long,) = sequences(1, max_tokens=9)
    long.tokens *= 256
    assert not drafts.watches(long, 1, 0)


def test_one_row_that_is_seen_is_enough_to_learn_what_acceptance_is_now():
    drafts, rows = lengths(CHEAP), sequences(32)
    teach_often(drafts, sequences(1), [1] * 8, 400)
    for seq in rows[1:]:
        seq.watched = False
    tried = 0
    for _ in range(1000):
        length, *others = chosen(drafts, rows)
        assert not any(others)
        tried += length > 0
        teach(drafts, rows, [1] * 8, num_drafted=length)
    assert tried > 5


def test_unseen_rows_are_not_drafted_for_and_do_not_count():
    """Two of 40 rows that the drafter has seen do not pay for a round with proposals; 40 do."""
    drafts, rows = lengths(CHEAP), sequences(40)
    for seq in rows[:38]:
        seq.watched = False
    assert chosen(drafts, rows) == [0] * 40
    assert chosen(drafts, rows[20:]) == [0] * 20
    assert chosen(drafts, rows[37:]) == [0, *chosen(lengths(CHEAP), sequences(2))]
    assert chosen(drafts, rows[:3]) == [0] * 3


def test_rows_left_behind_by_a_burst_are_caught_up_with():
    drafts, rows = DraftLengths(MOST, BURST, CHUNK), sequences(40)
    for seq in rows[:39]:
        seq.watched = False
    assert drafts.late(rows, 8) == []
    assert drafts.late(rows[36:], 8) == rows[36:39]
    ending = rows[0]
    ending.tokens += [7] * (draft_lengths.left_of(ending) - 2)
    assert drafts.late([ending], 8) == [], "two tokens are not worth it"


def test_sampling_rows_are_judged_by_their_own_rounds():
    drafts = DraftLengths(MOST, {SamplerForm.GREEDY: {8: CHEAP}, SamplerForm.SIMPLE: {8: DEAR}, SamplerForm.FULL: {}})
    assert chosen(drafts, sequences(2))[0] > 0
    assert chosen(drafts, sequences(2, temperature=1.0)) == [0, 0]


def teach_declining(drafts: DraftLengths, rows: list[Sequence], steps: int, every: int) -> None:
    """Each row has MOST proposals in one of so many rounds, and keeps them."""
    for step in range(steps * every):
        for row in rows:
            made = MOST * (step % every == 0)
            plan = StepPlan(0, StepKind.DECODE, 1, SamplerForm.GREEDY, (0,), ((),), (2,), (True,), num_drafted=(MOST,))
            result = StepResult([[7] * (made + 1)], round_counts=[[made + 1]], made_counts=[[made]])
            judged = drafts.learn([row], plan, result)
            assert judged == [(MOST, MOST, True)] * (made > 0)


@pytest.mark.parametrize(("num_rows", "length"), [(1, MOST), (40, 0)])
def test_a_drafter_that_declines_is_asked_where_its_few_proposals_pay(num_rows, length):
    """One row alone: rounds without proposals cost nothing. Of 40 rows each proposal makes all rows' round longer."""
    drafts, rows = lengths(CHEAP), sequences(num_rows)
    teach_declining(drafts, rows, 10, every=50)
    assert chosen(drafts, rows) == [length] * num_rows
    assert all(row.acceptance.judged == row.acceptance.kept > 0 for row in rows)


@given(st.integers(1, 15), st.floats(0.05, 0.99), st.floats(1.0, 4.0), st.floats(0.01, 1.0), st.integers(1, 64))
def test_the_length_is_the_best_of_all(most, chance, first, more, num_rows):
    """Rows that are alike, many proposals seen: no other length has more tokens a second, counted case by case."""
    seconds = RoundSeconds(1.0, first, first + more * (most - 1))
    drafts, rows = lengths(seconds, most=most), sequences(num_rows)
    for seq in rows:
        seq.acceptance.judged, seq.acceptance.kept = 1e9, chance * 1e9

    def rate(length: int) -> float:
        if not length:
            return draft_lengths.GAIN
        tokens = sum((kept + 1) * chance**kept * (1 - chance) for kept in range(length)) + (length + 1) * chance**length
        return tokens / (first + more * (length - 1))

    found = set(chosen(drafts, rows))
    assert len(found) == 1
    (length,) = found
    worthwhile = max((n for n in range(1, most + 1) if chance**n >= draft_lengths.LEAST_CHANCE), default=0)
    best = max(range(most + 1), key=rate)
    assert length == min(best, worthwhile) or math.isclose(rate(length), rate(best), rel_tol=1e-6)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 64])
def test_rounds_are_those_of_the_program_that_runs(num_rows):
    by_size = {2: CHEAP, 8: DEAR, 64: RoundSeconds(3.0, 4.0, 5.0)}
    clock = RoundClock(MOST, dict.fromkeys(SamplerForm, by_size))
    assert clock.seconds(SamplerForm.FULL, num_rows) == by_size[2 if num_rows <= 2 else 8 if num_rows <= 8 else 64]


def in_service(drafts: DraftLengths, rows: list[Sequence], truth: RoundSeconds, counts: list[int], steps: int
               ) -> list[int]:  # fmt: skip
    """Proposals of each step, where the machine's rounds take what `truth` says and it is slower and slower."""
    size, found = len(rows), []
    for step in range(steps):
        (length,) = set(chosen(drafts, rows, len(counts)))
        found.append(length)
        tokens = counts if length else [1] * len(counts)
        plan = StepPlan(0, StepKind.DECODE, len(counts), SamplerForm.GREEDY, tuple(range(size)), ((),) * size,
                        (2,) * size, (True,) * size, num_drafted=(length,) * size if length else ())  # fmt: skip
        drafts.learn(rows, plan, StepResult(
            [[7] * sum(tokens)] * size, round_counts=[tokens] * size, made_counts=[[length] * len(tokens)] * size,
            seconds=len(counts) * truth.of(length, MOST) * (1 + step / 20)))
    return found


@pytest.mark.parametrize(("start", "truth", "pays"), [(CHEAP, DEAR, False), (DEAR, CHEAP, True), (CHEAP, CHEAP, True)])
def test_what_was_measured_at_start_is_corrected_in_service(start, truth, pays):
    """Where it errs by three times, and whatever the machine does to plain rounds and others alike."""
    mild = RoundSeconds(start.plain, *((one + 2 * start.plain) / 2 for one in (start.one, start.most)))
    drafts, rows = lengths(mild), sequences(2)
    found = in_service(drafts, rows, truth, [4] * 8, 2000)
    share = sum(length > 0 for length in found[-1000:]) / 1000
    assert share > 0.95 if pays else share < 0.05


def test_steps_with_proposals_are_compared_with_plain_ones_now_and_then():
    drafts, rows = lengths(CHEAP), sequences(1)
    found = in_service(drafts, rows, CHEAP, [5] * 8, 600)
    checks = [index for index, length in enumerate(found) if not length]
    assert checks == [8, 25, 58, 123, 252, 381, 510]


def lapsed(rows: list[Sequence], gap: int) -> list[Sequence]:
    """Rows that the drafter has seen, but for their last tokens."""
    for seq in rows:
        seq.tokens += [7] * (100 + gap)
        seq.seen = len(seq.tokens) - gap
    return rows


def test_rows_with_a_gap_are_drafted_for_once_it_is_caught_up_with():
    drafts, rows = DraftLengths(MOST, BURST, CHUNK), lapsed(sequences(3), 20)
    assert chosen(drafts, rows) == [0] * 3
    assert drafts.late(rows, 8) == rows
    drafts.choose(rows, 8, SamplerForm.GREEDY, rows[:2])
    assert rows[0].num_drafted == rows[1].num_drafted > 0 == rows[2].num_drafted
    assert drafts.late(lapsed(sequences(40), 20), 8) == [], "whatever is kept"
    assert DraftLengths(MOST, BURST).late(rows, 8) == [], "a drafter to which prompts are no work has no gaps"


def test_only_the_gap_is_to_be_caught_up_with():
    drafts = DraftLengths(MOST, BURST, CatchUp(8, 100.0))
    (near,), (far,), (unseen,) = (lapsed(sequences(1, max_tokens=700), gap) for gap in (8, 80, 8))
    unseen.watched, unseen.seen = False, None
    assert [drafts.late([seq], 8) for seq in (near, far, unseen)] == [[near], [], []]


def test_what_would_not_be_drafted_for_is_not_caught_up_with():
    """Or it would be again in every step: others' proposals are kept, this row's are not."""
    drafts, (good,), (bad,) = DraftLengths(MOST, BURST, CHUNK), sequences(1), sequences(1)
    teach_often(drafts, [bad], [1] * 8, 20)
    teach_often(drafts, [good], [5] * 8, 100)
    assert chosen(drafts, [bad]) == [0] < chosen(drafts, [good])
    assert drafts.late(lapsed([bad], 20), 8) == []
    (hopeless,) = sequences(1)
    hopeless.acceptance.add(1000.0, 0.0, 1e9)
    assert drafts.late([*lapsed([hopeless], 20), *sequences(1)], 8) == [], "beside others it is not drafted for either"
    ending = lapsed(sequences(3, max_tokens=122), 20)
    assert drafts.late([*ending, *lapsed([good], 20)], 8) == [good]


def test_trying_again_catches_up_with_one_row_for_a_hundredth_of_the_time():
    drafts, rows, spent, plain, tried = DraftLengths(MOST, BURST, CatchUp(8, 4.0)), sequences(3), 0.0, 0.0, 0
    teach_often(drafts, sequences(1), [1] * 8, 400)
    for gap, seq in zip((64, 16, 32), rows, strict=True):
        lapsed([seq], gap)
    for _ in range(8000):
        ready = drafts.late(rows, 8)
        assert ready in ([], [rows[1]]), "the one that is nearest"
        drafts.choose(rows, 8, SamplerForm.GREEDY, ready)
        length = rows[1].num_drafted
        assert bool(length) == bool(ready)
        tried += bool(ready)
        spent, plain = spent + (8 * 0.4 + 2 * 4.0 if ready else 0.0), plain + 8
        teach(drafts, sequences(3), [1] * 8, num_drafted=length)
    assert tried > 5 and spent <= 0.011 * plain
