"""How long it stands that nothing is drafted, and what ends it."""

from draft_teaching import CHEAP, DEAR, MOST, chosen, lengths, sequences, teach, teach_often

from jaxinfer import draft_lengths
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.types import SamplerForm, StepKind, StepPlan, StepResult


def rests(drafts: DraftLengths, num_rows: int, form: SamplerForm = SamplerForm.GREEDY) -> bool:
    return drafts.rests(form, num_rows)


def test_a_no_stands_for_a_while():
    drafts, rows = lengths(DEAR), sequences(2)
    teach(drafts, rows, [1] * 8, num_drafted=0)
    assert not rests(drafts, 2), "nothing was asked"
    assert chosen(drafts, rows) == [0] * 2
    assert rests(drafts, 2) and not rests(drafts, 1) and not rests(drafts, 3)
    assert not rests(drafts, 2, SamplerForm.FULL), "other rounds take another time"
    teach_often(drafts, rows, [1] * 8, draft_lengths.RESTING // 8 - 1, num_drafted=0)
    assert rests(drafts, 2)
    teach(drafts, rows, [1] * 8, num_drafted=0)
    assert not rests(drafts, 2), "it is asked for again now and then"


def test_a_no_ends_where_rows_begin_or_proposals_teach():
    drafts, rows = lengths(DEAR), sequences(2)
    teach(drafts, rows, [1] * 8, num_drafted=0)
    chosen(drafts, rows)
    assert rests(drafts, 2)
    drafts.watches(rows[1], 2, 0)  # a row may begin in the step in which another has ended
    assert not rests(drafts, 2)
    chosen(drafts, rows)
    assert rests(drafts, 2)
    teach(drafts, rows, [1] * 8, MOST)
    assert not rests(drafts, 2)
    chosen(drafts, rows)
    assert rests(drafts, 2)
    teach(drafts, rows, [1] * 8, num_drafted=0)
    assert not rests(drafts, 2), "with the plain step behind them it is known what proposals take"


def test_a_plain_step_that_only_compares_is_no_rest():
    drafts, rows = lengths(CHEAP), sequences(1)
    while chosen(drafts, rows) != [0]:
        teach(drafts, rows, [5] * 8)
    assert not rests(drafts, 1)


def test_bad_acceptance_is_tried_again_beside_rows_with_a_grammar():
    """Their plain steps are of the kind PREFILL, of one round and without a prompt."""
    drafts, rows = lengths(CHEAP), sequences(2)
    teach_often(drafts, rows, [1] * 8, 400)
    plan = StepPlan(0, StepKind.PREFILL, 1, SamplerForm.GREEDY, (0, 1), ((), ()), (2, 2), (True, True),
                    constrained=True)  # fmt: skip
    tried = 0
    for _ in range(1000):
        length, *_ = chosen(drafts, rows, rounds=1)
        tried += length > 0
        if length:
            teach(drafts, rows, [1], length)
        else:
            drafts.learn(rows, plan, StepResult([[7], [7]]))
    assert 5 < tried < 30
