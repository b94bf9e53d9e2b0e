"""What a plan contains: kinds, budget, order, bounds, samplers."""

import pytest
from scheduler_device import Harness, make_config, make_request

from jaxinfer.errors import InvalidRequest
from jaxinfer.types import RowInit, SamplerForm, StepKind


def ready(count: int = 1, depth: int = 0, prompt=(1, 2, 3), config: dict | None = None, **fields) -> Harness:
    """A harness with `count` rows that have their first token."""
    harness = Harness(make_config(**config or {}), depth)
    for _ in range(count):
        harness.make(prompt=prompt, **({"max_tokens": 20} | fields))
    while harness.scheduler.num_waiting or any(plan.kind is StepKind.PREFILL for plan, _ in harness.in_flight):
        harness.plan()
        harness.commit()
    return harness


def test_nothing_to_do_is_no_plan():
    harness = Harness()
    assert harness.plan() is None
    assert not harness.scheduler.has_work


def test_a_prompt_is_computed_in_one_chunk_and_samples():
    harness = Harness()
    harness.make(prompt=(1, 2, 3))
    plan = harness.plan()
    assert (plan.kind, plan.tokens, plan.starts, plan.samples) == (StepKind.PREFILL, ((1, 2, 3),), (0,), (True,))


def test_a_first_chunk_carries_the_row_and_its_pages():
    harness = Harness()
    harness.make(prompt=range(6), max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, min_tokens=2,
                 stop_ids=(9,), seed=77)
    plan = harness.plan()
    assert plan.init_rows == (RowInit(slot=0, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=77, seeded=False,
                                      sample_index=0, tokens_left=7, min_position=8, stop_ids=(9,)),)
    assert plan.new_pages == ((0, 0, (0, 1)),)


def test_a_long_prompt_is_cut_to_the_budget():
    harness = Harness(make_config(max_num_batched_tokens=10))
    harness.make(prompt=range(24))
    plans = [harness.plan() for _ in range(3)]
    assert [plan.starts for plan in plans] == [(0,), (10,), (20,)]
    assert [len(plan.tokens[0]) for plan in plans] == [10, 10, 4]
    assert [plan.samples for plan in plans] == [(False,), (False,), (True,)]
    assert [len(plan.init_rows) for plan in plans] == [1, 0, 0]


def test_a_step_fills_its_budget_with_the_next_prompt():
    harness = Harness(make_config(max_num_batched_tokens=10))
    harness.make(prompt=range(7))
    harness.make(prompt=range(20, 28))
    assert [len(ids) for ids in harness.plan().tokens] == [7, 3]
    assert [len(ids) for ids in harness.plan().tokens] == [0, 5]


def test_decode_rows_come_before_chunks_and_leave_them_the_rest_of_the_budget():
    harness = ready(2, config={"max_num_batched_tokens": 10})
    harness.make(prompt=range(20))
    plan = harness.plan()
    assert plan.kind is StepKind.PREFILL
    assert [len(ids) for ids in plan.tokens] == [0, 0, 8]
    assert plan.starts == (3, 3, 0)


def test_single_token_chunks_stand_before_longer_ones():
    harness = ready(1)
    harness.make(prompt=range(10, 15))
    harness.make(prompt=(7,))
    plan = harness.plan()
    assert [len(ids) for ids in plan.tokens] == [0, 1, 5]
    assert plan.slots == (0, 2, 1)


def test_rows_that_only_decode_make_a_decode_plan():
    plan = ready(2).plan()
    assert (plan.kind, plan.slots, plan.tokens, plan.starts) == (StepKind.DECODE, (0, 1), ((), ()), (3, 3))


def test_plans_ahead_count_tokens_in_flight():
    harness = ready(1, depth=2)
    assert [harness.plan().starts for _ in range(3)] == [(3,), (4,), (5,)]


def test_a_row_is_not_planned_past_its_certain_end():
    harness = Harness(depth=2)
    harness.make(prompt=(1, 2), max_tokens=2)
    assert harness.plan().samples == (True,)
    assert harness.plan().starts == (2,)
    assert harness.plan() is None
    harness.run()
    harness.check_outputs()


def test_a_row_with_one_token_to_give_is_never_decoded():
    harness = Harness()
    harness.make(max_tokens=1)
    harness.run()
    assert [plan.kind for plan in harness.plans] == [StepKind.PREFILL]


def test_rounds_are_fused_while_nobody_waits():
    assert ready(2, config={"max_decode_rounds": 6}).plan().num_rounds == 6


def test_rounds_stop_at_the_most_any_row_can_need():
    harness = ready(1, config={"max_decode_rounds": 6}, max_tokens=4)
    assert harness.plan().num_rounds == 3
    harness = Harness(make_config(max_decode_rounds=6))
    harness.make(prompt=(1,), max_tokens=2)
    harness.make(prompt=(2,), max_tokens=5)
    harness.step()
    assert harness.plan().num_rounds == 4


def test_one_round_while_a_request_waits():
    harness = ready(4, config={"max_decode_rounds": 6})
    harness.make()
    assert harness.plan().num_rounds == 1


def test_one_round_beside_a_prompt():
    harness = ready(1, config={"max_decode_rounds": 6, "max_num_batched_tokens": 4})
    harness.make(prompt=range(9))
    assert [harness.plan().num_rounds for _ in range(4)] == [1, 1, 1, 6]


def test_pages_for_one_token_only_beside_a_prompt():
    harness = ready(1, prompt=(1, 2, 3, 4), config={"max_decode_rounds": 6, "max_num_batched_tokens": 4})
    harness.make(prompt=range(9))
    assert [len(harness.plan().new_pages) for _ in range(3)] == [2, 0, 0]


def test_running_rows_come_before_waiting_ones_of_better_priority():
    harness = Harness(make_config(max_num_batched_tokens=8))
    harness.make(prompt=range(12), priority=5)
    harness.plan()
    harness.make(prompt=range(30, 42), priority=0)
    assert [len(ids) for ids in harness.plan().tokens] == [4, 4]
    assert [init.slot for init in harness.plans[-1].init_rows] == [1]


@pytest.mark.parametrize(("first", "second"), [
    ({"priority": 1}, {"priority": 0}),
    ({"arrival": 2.0}, {"arrival": 1.0}),
    ({"id": "b", "arrival": 1.0}, {"id": "a", "arrival": 1.0}),
])
def test_waiting_rows_start_by_priority_then_arrival_then_id(first: dict, second: dict):
    harness = Harness(make_config(max_num_seqs=1))
    harness.make(prompt=(1,), **first)
    harness.make(prompt=(2,), **second)
    assert harness.plan().tokens == ((2,),)


def test_the_lowest_free_slot_is_taken():
    harness = ready(3)
    harness.cancel("r0001")
    harness.cancel("r0000")
    harness.make(prompt=(5,))
    assert harness.plan().init_rows[0].slot == 0


def test_no_more_rows_than_slots():
    harness = Harness(make_config(max_num_seqs=2, max_num_batched_tokens=16))
    for number in range(3):
        harness.make(prompt=(number,))
    assert len(harness.plan().slots) == 2
    assert harness.scheduler.num_waiting == 1


@pytest.mark.parametrize(("fields", "form"), [
    ({}, SamplerForm.GREEDY),
    ({"temperature": 0.7}, SamplerForm.SIMPLE),
    ({"logprobs": 0}, SamplerForm.FULL),
    ({"temperature": 0.7, "logprobs": 3}, SamplerForm.FULL),
    ({"min_tokens": 2}, SamplerForm.GREEDY),
    ({"min_tokens": 1, "stop_ids": (9,)}, SamplerForm.FULL),
])
def test_the_smallest_sampler_that_serves_a_row(fields: dict, form: SamplerForm):
    harness = Harness()
    harness.make(**fields)
    assert harness.plan().sampler is form


def test_one_demanding_row_sets_the_sampler_of_the_step():
    harness = ready(1)
    harness.make(prompt=(5,), temperature=1.0)
    assert [harness.plan().sampler for _ in range(2)] == [SamplerForm.SIMPLE] * 2
    harness.cancel("r0001")
    assert harness.plan().sampler is SamplerForm.GREEDY


def test_a_chunk_that_does_not_sample_asks_nothing_of_the_sampler():
    harness = Harness(make_config(max_num_batched_tokens=4))
    harness.make(prompt=range(6), logprobs=1)
    assert [harness.plan().sampler for _ in range(2)] == [SamplerForm.GREEDY, SamplerForm.FULL]


def test_a_row_past_its_minimum_length_needs_no_full_sampler():
    harness = Harness(depth=2)
    harness.make(prompt=(1,), min_tokens=2, stop_ids=(40,), max_tokens=9)
    assert [harness.plan().sampler for _ in range(3)] == [SamplerForm.FULL, SamplerForm.FULL, SamplerForm.GREEDY]


def test_samples_of_a_request_are_rows_of_their_own():
    harness = Harness()
    harness.make(prompt=(1, 2), n=3, seed=5)
    inits = harness.plan().init_rows
    assert [(init.seed, init.sample_index, init.slot) for init in inits] == [(5, 0, 0), (5, 1, 1), (5, 2, 2)]


def test_load_counts_rows_tokens_and_pages():
    harness = Harness(make_config(max_num_batched_tokens=8, max_num_seqs=1))
    harness.make(prompt=range(12))
    harness.make(prompt=range(20, 25))
    harness.plan()
    load = harness.scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 1, 4 + 5)
    assert (load.pages_used, load.pages_cached, load.pages_total) == (3, 0, 40)


@pytest.mark.parametrize(("fields", "field"), [
    ({"id": "r0000"}, "id"),
    ({"prompt": ()}, "prompt"),
    ({"max_tokens": 0}, "prompt"),
    ({"prompt": range(40), "max_tokens": 9}, "max_tokens"),
])
def test_requests_that_could_not_end_are_refused(fields: dict, field: str):
    harness = Harness()
    harness.make()
    with pytest.raises(InvalidRequest) as refusal:
        harness.scheduler.add(make_request(**{"id": "new", **fields}))
    assert refusal.value.field == field
    assert harness.scheduler.num_waiting == 1


def test_an_id_may_come_again_after_its_end():
    harness = Harness()
    harness.make()
    harness.run()
    harness.scheduler.add(make_request(id="r0000"))
    assert harness.scheduler.num_waiting == 1
