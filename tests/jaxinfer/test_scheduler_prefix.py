"""Shared prefixes: cached blocks, waiting for blocks that are being computed, prompt scores."""

import pytest
from scheduler_device import Harness, make_config

LONG = tuple(range(20, 33))  # 13 tokens, 3 full pages


def computed(harness: Harness) -> int:
    """Prompt tokens the device was given."""
    return sum(len(ids) for plan in harness.plans for ids in plan.tokens)


def finished(**fields) -> Harness:
    """A harness whose cache holds LONG."""
    harness = Harness(make_config(max_num_batched_tokens=32))
    harness.make(prompt=LONG, max_tokens=1, **fields)
    harness.run()
    return harness


def test_a_cached_prefix_is_not_computed_again():
    harness = finished()
    harness.make(prompt=(*LONG[:9], 1, 2), max_tokens=2)
    plan = harness.plan()
    assert (plan.starts, plan.tokens) == ((8,), ((LONG[8], 1, 2),))
    assert plan.new_pages[0][2][:2] == harness.plans[0].new_pages[0][2][:2]


def test_a_full_hit_still_computes_the_last_token():
    harness = finished()
    harness.make(prompt=LONG[:12])
    assert (harness.plan().starts, harness.plans[-1].tokens) == ((8,), (LONG[8:12],))


def test_a_hit_up_to_the_last_token_computes_only_that():
    harness = finished()
    harness.make(prompt=LONG)
    assert (harness.plan().starts, harness.plans[-1].tokens) == ((12,), (LONG[12:],))


def test_output_is_cached_like_prompt():
    harness = Harness()
    harness.make(prompt=LONG, max_tokens=12)
    harness.run()
    harness.make(prompt=range(20, 46), max_tokens=1)
    assert harness.plan().starts == (24,)


def test_pages_are_cached_at_commit_not_before():
    harness = Harness(make_config(max_num_batched_tokens=32), depth=1)
    harness.make(prompt=LONG, max_tokens=9)
    harness.plan()
    assert harness.pool.match(harness.scheduler._running[0].hashes) == []
    harness.commit()
    assert len(harness.pool.match(harness.scheduler._running[0].hashes)) == 3


def test_inner_chunks_are_cached_too():
    harness = Harness(make_config(max_num_batched_tokens=9))
    harness.make(prompt=LONG)
    harness.step()
    assert len(harness.pool.match(harness.scheduler._running[0].hashes)) == 2


def test_salts_keep_tenants_apart():
    harness = finished(cache_salt="one")
    harness.make(prompt=LONG, cache_salt="two", max_tokens=1)
    assert harness.plan().starts == (0,)
    harness.make(prompt=LONG, cache_salt="one", max_tokens=1)
    assert harness.plan().starts == (12,)


def test_without_the_prefix_cache_everything_is_computed():
    harness = Harness(make_config(enable_prefix_caching=False, max_num_batched_tokens=32))
    for _ in range(2):
        harness.make(prompt=LONG, max_tokens=1)
    assert harness.plan().starts == (0, 0)
    harness.run()
    assert harness.pool.num_idle == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_eight_equal_prompts_compute_their_prefix_once(depth: int):
    harness = Harness(make_config(max_num_seqs=8, max_num_batched_tokens=64, num_pages=80), depth)
    for _ in range(8):
        harness.make(prompt=LONG)
    harness.run()
    assert computed(harness) == 13 + 7
    harness.check_outputs()


def test_samples_share_their_prompt():
    harness = Harness()
    harness.make(prompt=LONG, n=4)
    harness.run()
    assert computed(harness) == 13 + 3
    harness.check_outputs()


def test_a_row_that_waits_for_a_block_does_not_block_those_behind_it():
    harness = Harness(make_config(max_num_batched_tokens=32))
    harness.make(prompt=LONG)
    harness.make(prompt=(*LONG[:8], 1))
    harness.make(prompt=(1, 2, 3))
    assert [ids[0] for ids in harness.plan().tokens] == [LONG[0], 1]


def test_a_row_waits_only_for_the_blocks_it_needs():
    harness = Harness(make_config(max_num_batched_tokens=9))
    harness.make(prompt=range(20, 40))
    harness.make(prompt=(*LONG[:8], 1), priority=1)
    harness.step()
    assert len(harness.plan().init_rows) == 0, "the budget is spent"
    harness = Harness(make_config(max_num_batched_tokens=12))
    harness.make(prompt=range(20, 40))
    harness.make(prompt=(*LONG[:8], 1), priority=1)
    harness.step()
    assert harness.plan().starts == (8, 12), "its two blocks are there, the others are of no use to it"


def test_a_short_prompt_has_no_block_to_wait_for():
    harness = Harness()
    for _ in range(2):
        harness.make(prompt=LONG[:4])
    assert len(harness.plan().init_rows) == 2


def test_nobody_waits_for_a_cancelled_row():
    harness = Harness()
    harness.make(prompt=LONG)
    harness.make(prompt=LONG)
    harness.plan()
    harness.cancel("r0000")
    assert harness.plan().starts == (0,)


def test_a_row_that_leaves_does_not_stop_the_wait_for_another():
    harness = Harness(make_config(max_num_batched_tokens=48))
    harness.make(prompt=LONG)
    harness.make(prompt=LONG, prompt_logprobs=0)
    harness.make(prompt=LONG)
    assert len(harness.plan().init_rows) == 2, "a scored prompt cannot wait for the cache"
    harness.cancel("r0001")
    assert not harness.plan().init_rows


def test_nobody_waits_for_a_row_that_lost_its_pages():
    harness = Harness(depth=1)
    harness.make(prompt=LONG, priority=1)
    harness.plan()
    harness.make(prompt=LONG)
    harness.fail()
    assert [init.seed for init in harness.plan().init_rows] == [1]


def test_a_resumed_row_takes_its_own_pages_back():
    harness = Harness()
    harness.make(prompt=LONG, max_tokens=20)
    for _ in range(6):
        harness.step()
    pages = list(harness.scheduler._running[0].pages)
    harness.scheduler._preempt(harness.scheduler._running[0])
    plan = harness.plan()
    assert (plan.starts, plan.new_pages[0][2][:4]) == ((16,), tuple(pages[:4]))
    harness.run()
    harness.check_outputs()


def test_cached_tokens_are_reported():
    harness = finished()
    harness.make(prompt=LONG, max_tokens=1)
    harness.run()
    assert [end.stats.num_cached_tokens for end in harness.ends.values()] == [0, 12]
    assert (harness.scheduler.metrics.cached_tokens, harness.scheduler.metrics.query_tokens) == (12, 26)


# ---- prompt scores


def test_scored_prompts_take_nothing_from_the_cache():
    harness = finished()
    harness.make(prompt=LONG, prompt_logprobs=1)
    plan = harness.plan()
    assert plan.starts == (0,) and plan.prompt_logprobs
    assert plan.next_tokens == (-1,)


def test_a_plan_without_scored_rows_says_so():
    harness = finished()
    assert not harness.plans[0].prompt_logprobs and harness.plans[0].next_tokens == ()


def test_scores_go_on_across_chunks():
    harness = Harness(make_config(max_num_batched_tokens=5))
    harness.make(prompt=LONG, prompt_logprobs=2)
    harness.run()
    assert [plan.next_tokens for plan in harness.plans[:3]] == [(LONG[5],), (LONG[10],), (-1,)]
    assert [plan.prompt_logprobs for plan in harness.plans] == [True] * 3 + [False] * 3
    scores = harness.scores["r0000"]
    assert [one.token_id for one in scores] == list(LONG[1:])
    assert {len(one.top) for one in scores} == {2}


def test_output_is_not_scored_beside_a_scored_prompt():
    harness = Harness(make_config(max_num_batched_tokens=22, enable_prefix_caching=False))
    harness.make(prompt=LONG, max_tokens=20)
    for _ in range(9):
        harness.step()
    harness.scheduler._preempt(harness.scheduler._running[0])
    harness.make(prompt=(1,), prompt_logprobs=0, priority=-1)
    plan = harness.plan()
    assert [len(ids) for ids in plan.tokens] == [1, 21], "the chunk ends in known output"
    assert plan.next_tokens == (-1, -1)


def test_scores_come_with_the_first_token_and_once():
    harness = Harness()
    harness.make(prompt=(1, 2, 3), prompt_logprobs=0, n=2)
    harness.run()
    assert [one.token_id for one in harness.scores["r0000"]] == [2, 3]


def test_a_prompt_of_one_token_has_an_empty_score():
    harness = Harness()
    harness.make(prompt=(1,), prompt_logprobs=0, max_tokens=1)
    harness.run()
    assert harness.scores["r0000"] == []


def test_scores_start_again_after_a_failure():
    harness = Harness(make_config(max_num_batched_tokens=5))
    harness.make(prompt=LONG, prompt_logprobs=1)
    harness.step()
    harness.fail()
    harness.run()
    harness.check_outputs()


def test_a_row_with_delivered_scores_resumes_like_any_other():
    harness = Harness()
    harness.make(prompt=LONG, prompt_logprobs=1, max_tokens=9)
    harness.step()
    harness.scheduler._preempt(harness.scheduler._running[0])
    plan = harness.plan()
    assert (plan.starts, plan.prompt_logprobs) == ((12,), False)
    harness.run()
    harness.check_outputs()
