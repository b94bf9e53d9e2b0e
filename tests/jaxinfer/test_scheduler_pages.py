"""Pages of running rows: growth, stalls, preemption, failed steps."""

from scheduler_device import Harness, make_config


def crowded(depth: int = 0, priorities=(0, 0), num_pages: int = 12, **config) -> Harness:
    """Rows that need their second page now, in a pool with one page left."""
    harness = Harness(make_config(num_pages=num_pages, **config), depth)
    for number, priority in enumerate(priorities):
        harness.make(prompt=range(10 * number, 10 * number + 4), max_tokens=20, priority=priority)
    harness.plan()
    harness.commit()
    taken = harness.pool.allocate(harness.pool.num_free - 1)
    assert taken is not None
    harness.check = False  # the pool cannot know the holder of the pages taken here
    return harness


def test_a_page_is_added_when_a_row_reaches_its_end():
    harness = Harness()
    harness.make(prompt=range(3), max_tokens=9)
    plans = [harness.plan() for _ in range(6)]
    assert [plan.new_pages for plan in plans] == [((0, 0, (0,)),), (), ((0, 1, (1,)),), (), (), ()]


def test_pages_for_all_rounds_are_reserved_at_once():
    harness = Harness(make_config(max_decode_rounds=8))
    harness.make(prompt=range(4), max_tokens=20)
    harness.step()
    assert harness.plan().new_pages == ((0, 1, (1, 2)),)


def test_no_page_is_reserved_for_tokens_a_row_cannot_give():
    harness = Harness(make_config(max_decode_rounds=8))
    harness.make(prompt=range(4), max_tokens=5)
    harness.make(prompt=range(10, 14), max_tokens=20)
    harness.step()
    assert [len(pages) for _, _, pages in harness.plan().new_pages] == [1, 2]


def test_fewer_rounds_rather_than_a_preemption():
    harness = crowded(priorities=(0,), max_decode_rounds=8)
    plan = harness.plan()
    assert (plan.num_rounds, len(plan.new_pages)) == (1, 1)


def test_the_better_row_gets_the_last_page():
    harness = crowded(priorities=(1, 0))
    plan = harness.plan()
    assert plan.slots == (0,) and harness.scheduler.metrics.preemptions == 1
    assert [seq.request_id for seq in harness.scheduler._running] == ["r0001"]


def test_the_latest_arrival_is_preempted_first():
    harness = crowded(priorities=(0, 0, 0))
    harness.plan()
    assert [seq.request_id for seq in harness.scheduler._running] == ["r0000", "r0001"]


def test_the_worst_row_gives_way_even_if_it_does_not_lack_pages():
    harness = Harness(make_config(num_pages=12))
    harness.make(prompt=range(4), max_tokens=20)
    harness.make(prompt=range(10, 12), max_tokens=20, priority=1)
    harness.step()
    harness.pool.allocate(harness.pool.num_free)
    harness.check = False
    assert harness.plan().slots == (0,)
    assert harness.scheduler.num_waiting == 1


def test_a_row_only_stalls_while_a_step_is_in_flight():
    harness = Harness(make_config(num_pages=12), depth=1)
    harness.make(prompt=range(4), max_tokens=20)
    harness.make(prompt=range(10, 12), max_tokens=20)
    harness.plan()
    harness.pool.allocate(harness.pool.num_free)
    harness.check = False
    assert harness.plan().slots == (1,)
    assert harness.scheduler.metrics.preemptions == 0
    while harness.plan():
        harness.commit()
    assert harness.in_flight, "the engine has to drain before anything is preempted"


def test_nobody_is_admitted_in_a_step_that_lacked_pages():
    harness = crowded(priorities=(0, 0))
    harness.make(prompt=(40,), priority=-1)
    assert not harness.plan().init_rows
    assert harness.scheduler.metrics.preemptions == 1


def test_a_preempted_row_waits_before_later_ones():
    harness = crowded(priorities=(0, 0))
    harness.make(prompt=(40,))
    harness.plan()
    assert [seq.request_id for seq in harness.scheduler._waiting] == ["r0001", "r0002"]


def test_a_preempted_row_is_recomputed_from_all_its_tokens():
    harness = Harness(make_config(num_pages=12, max_num_seqs=3, max_num_batched_tokens=48, enable_prefix_caching=False))
    for number in range(3):
        harness.make(prompt=range(10 * number, 10 * number + 12), max_tokens=30)
    while not harness.scheduler.metrics.preemptions:
        harness.step()
    victim, step_id = harness.scheduler._waiting[0], len(harness.plans)
    known = tuple(victim.tokens)
    assert victim.request_id == "r0002" and len(known) > 12
    harness.run()
    plan = next(plan for plan in harness.plans[step_id:] if any(init.seed == 2 for init in plan.init_rows))
    init = plan.init_rows[-1]
    assert plan.tokens[plan.slots.index(init.slot)] == known
    assert init.tokens_left == 12 + 30 - len(known)
    assert harness.ends["r0002", 0].stats.num_preemptions >= 1
    harness.check_outputs()


def test_a_new_row_leaves_each_running_one_a_page():
    harness = Harness(make_config(num_pages=12, max_num_batched_tokens=32, max_num_seqs=3))
    harness.make(prompt=range(10, 24), max_tokens=4)
    harness.make(prompt=range(30, 44), max_tokens=4)
    harness.plan()
    harness.make(prompt=range(9), max_tokens=4)
    assert not harness.plan().init_rows, "it would fit, but 2 running rows could not grow"
    harness.make(prompt=(1, 2), max_tokens=4, priority=-1)
    assert len(harness.plan().init_rows) == 1


def test_a_better_row_without_pages_is_not_overtaken():
    harness = Harness(make_config(num_pages=12, max_num_seqs=3, max_num_batched_tokens=48))
    harness.make(prompt=range(24), max_tokens=4)
    harness.plan()
    harness.make(prompt=range(20, 48), max_tokens=4)
    harness.make(prompt=(1,), max_tokens=4)
    assert not harness.plan().init_rows
    harness.run()
    harness.check_outputs()


def test_after_a_failed_step_rows_resume_in_their_order():
    harness = Harness(depth=1)
    for number in range(3):
        harness.make(prompt=(number, 7), max_tokens=9, priority=-number)
    for _ in range(3):
        harness.step()
    harness.fail()
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting, harness.pool.num_held) == (0, 3, 0)
    plan = harness.plan()
    assert [ids[0] for ids in plan.tokens] == [2, 1, 0]
    assert {len(ids) for ids in plan.tokens} == {4}
    harness.run()
    harness.check_outputs()


def test_a_result_from_before_a_failure_is_void():
    harness = Harness(depth=1)
    harness.make()
    plan = harness.plan()
    result = harness.in_flight[0][1]
    harness.fail()
    assert harness.scheduler.commit(plan, result, 1.0) == []
    assert not harness.scheduler._in_flight
    harness.run()
    harness.check_outputs()
