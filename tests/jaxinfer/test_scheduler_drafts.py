"""Which rows a draft model sees, and what the pool knows of its half of their pages: the scheduler alone."""

import pytest
from scheduler_device import make_config, make_request

from jaxinfer.draft_lengths import CatchUp, DraftLengths
from jaxinfer.page_pool import PagePool, block_hashes
from jaxinfer.planning import ready_of
from jaxinfer.round_clock import RoundSeconds
from jaxinfer.scheduler import Scheduler
from jaxinfer.sequence import Sequence
from jaxinfer.types import SamplerForm, StepPlan, StepResult

PAGE = 4


class Told(DraftLengths):
    """The drafter sees rows, proposes and is caught up with as the test says. asked: rows and unseen tokens."""

    def __init__(self, *, watches: bool = True, proposes: bool = False):
        super().__init__(3)
        self.sees, self.proposes, self.catches_up = watches, proposes, False
        self.asked: list[tuple[int, int]] = []

    def watches(self, seq, num_rows, num_unseen):
        self.asked.append((num_rows, num_unseen))
        return self.sees

    def late(self, rows, rounds):
        return [seq for seq in rows if not seq.watched or seq.seen is not None] if self.catches_up else []

    def choose(self, rows, rounds, form, ready=()):
        for seq in rows:
            seq.num_drafted = 3 * (self.proposes and (seq.watched or seq in ready))


def new_scheduler(drafts: Told, **changes) -> Scheduler:
    config = make_config(num_speculative_tokens=3, **changes)
    return Scheduler(config, PagePool(config.num_pages, PAGE), drafts=drafts)


def commit(scheduler: Scheduler, plan: StepPlan) -> None:
    """One token a round; proposals, where there are some, are refused."""
    counts = [[1] * plan.num_rounds for _ in plan.slots]
    made = [[min(3, seq.end - len(seq.tokens))] * plan.num_rounds if plan.num_drafted else [0] * plan.num_rounds
            for seq in scheduler.rows_of(plan)]  # fmt: skip
    ids = [[7] * plan.num_rounds if samples else [] for samples in plan.samples]
    scheduler.commit(plan, StepResult(ids, round_counts=counts, made_counts=made), 0.0)


def run(scheduler: Scheduler) -> list[StepPlan]:
    plans = []
    while scheduler.has_work and (plan := scheduler.plan()):
        commit(scheduler, plan)
        scheduler.check_invariants()
        plans.append(plan)
    return plans


def test_rows_that_begin_are_judged_beside_all_that_will_run():
    drafts = Told()
    scheduler = new_scheduler(drafts, max_num_batched_tokens=64)
    scheduler.add(make_request("alone", range(5), max_tokens=30))
    scheduler.plan()
    assert drafts.asked == [(1, 0)]
    for name in "abc":
        scheduler.add(make_request(name, [*name.encode()] * 5, arrival=1.0))
    scheduler.add(make_request("waits", [9] * 5, arrival=2.0))
    scheduler.plan()
    assert drafts.asked[1:] == [(4, 0)] * 3, "there are four slots"


@pytest.mark.parametrize("proposes", [True, False])
def test_output_of_steps_that_the_draft_model_did_not_see_is_unseen(proposes):
    """The prompt's pages are seen either way; the next turn of the conversation has to be caught up with."""
    drafts = Told(proposes=proposes)
    scheduler = new_scheduler(drafts)
    prompt = list(range(9))
    scheduler.add(make_request("a", prompt, max_tokens=12))
    run(scheduler)
    said = [*prompt, *[7] * 12]
    pages = scheduler.pool.match(block_hashes(said, PAGE, ("", "")))
    assert len(pages) == 4, "the last token, and the one before, are not computed by both"
    assert scheduler.pool.num_watched(pages) == (4 if proposes else 2)
    scheduler.add(make_request("b", [*said[:18], 1, 2], max_tokens=2))
    plan = scheduler.plan()
    assert plan is not None and drafts.asked[-1] == (1, 0 if proposes else 2 * PAGE)
    assert [(row.num_watched, len(row.tokens)) for row in plan.caught_up] == [(16 if proposes else 8, 16)]
    assert scheduler.pool.num_watched(pages) == 4


def test_rows_in_decode_are_caught_up_with_when_one_token_is_in_flight_at_most():
    drafts = Told(watches=False, proposes=True)
    scheduler = new_scheduler(drafts, max_decode_rounds=4)
    scheduler.add(make_request("a", range(9), max_tokens=30))
    first = scheduler.plan()
    second = scheduler.plan()
    assert first is not None and not first.watched and second is not None and second.num_rounds == 4
    commit(scheduler, first)
    drafts.catches_up = True
    third = scheduler.plan()
    assert third is not None and (third.num_rounds, third.caught_up, third.num_drafted) == (1, (), ())
    commit(scheduler, second)
    fourth = scheduler.plan()
    assert fourth is not None and fourth.num_drafted == (3,) and fourth.num_rounds == 4
    assert [len(row.tokens) for row in fourth.caught_up] == [9 + 1 + 4]


def test_the_gap_that_plain_steps_left_is_caught_up_with():
    """From the first token that the drafter may lack: the last one before them it may not have computed."""
    drafts = Told(proposes=True)
    scheduler = new_scheduler(drafts, max_num_batched_tokens=16)
    scheduler.add(make_request("a", range(9), max_tokens=30))
    commit(scheduler, scheduler.plan())
    commit(scheduler, scheduler.plan())
    drafts.proposes = False
    for _ in range(6):
        commit(scheduler, scheduler.plan())
    drafts.proposes = drafts.catches_up = True
    plan = scheduler.plan()
    assert plan is not None and plan.num_drafted == (3,)
    assert [(row.num_watched, row.tokens) for row in plan.caught_up] == [(9, (*range(9), *[7] * 8))]
    commit(scheduler, plan)
    following = scheduler.plan()
    assert following is not None and following.caught_up == ()
    commit(scheduler, following)
    run(scheduler)
    pages = scheduler.pool.match(block_hashes([*range(9), *[7] * 30], PAGE, ("", "")))
    assert scheduler.pool.num_watched(pages) == len(pages) == 9


def test_a_row_left_by_a_burst_is_drafted_for_while_steps_are_planned_ahead():
    """As the engine does: each step is planned before the one in flight is committed."""
    cheap, dear = RoundSeconds(1.0, 1.1, 1.4), RoundSeconds(1.0, 5.0, 6.0)
    drafts = DraftLengths(3, {form: {2: cheap, 4: dear} for form in SamplerForm}, CatchUp(256, 1.0))
    scheduler = new_scheduler(drafts, max_decode_rounds=4, max_model_len=400, num_pages=400)
    for index in range(4):
        scheduler.add(make_request(str(index), range(index, 9 + index), max_tokens=200 if index == 3 else 9))
    plans, in_flight = [], None
    while scheduler.has_work and len(plans) < 40:
        plan = scheduler.plan()
        if in_flight is not None:
            commit(scheduler, in_flight)
        in_flight = plan
        plans.append(plan)
    caught_up = next(index for index, plan in enumerate(plans) if plan and plan.caught_up)
    steps = [(plan.num_rounds, bool(plan.num_drafted)) for plan in plans[caught_up - 2:caught_up + 1]]
    assert steps == [(4, False), (1, False), (4, True)], "behind one round one token is in flight, then it drafts"


def test_a_row_that_is_not_drafted_for_beside_others_lapses():
    """Once the others have ended, the rounds of the step are plain and the draft model sees none of them."""
    drafts = Told(proposes=True)
    scheduler = new_scheduler(drafts, max_decode_rounds=4, max_num_batched_tokens=32)
    for index, name in enumerate("ab"):
        scheduler.add(make_request(name, range(index, 9 + index), max_tokens=30))
    commit(scheduler, scheduler.plan())
    a, b = scheduler._running
    drafts.choose = lambda rows, rounds, form, ready=(): setattr(a, "num_drafted", 3) or setattr(b, "num_drafted", 0)
    plan = scheduler.plan()
    assert plan is not None and sorted(plan.num_drafted) == [0, 3]
    assert (a.seen, b.seen) == (None, 8)


def test_a_step_is_not_held_up_by_all_rows_at_once():
    rows = [Sequence(make_request(str(index), range(length)), 0) for index, length in enumerate((6, 3, 9, 1))]
    assert ready_of(rows, 10) == set(rows[:2])
    assert ready_of(rows, 5) == {rows[0]}, "one in any case"
    rows[0].take_off(2, 2)
    assert ready_of(rows, 12) == {rows[1], rows[2]}
