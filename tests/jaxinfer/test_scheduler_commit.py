"""What a commit gives back: tokens, ends, log-probabilities, statistics; cancelling."""

import pytest
from scheduler_device import Harness, make_config

from jaxinfer.errors import StepFailed
from jaxinfer.types import StepResult, TokenLogprobs


def test_each_step_gives_a_chunk_with_its_token():
    harness = Harness()
    harness.make(prompt=(1, 2), max_tokens=3)
    chunks = [chunk for _ in range(3) for chunk in harness.step()]
    assert [chunk.token_ids for chunk in chunks] == [[3], [4], [5]]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]


def test_fused_rounds_give_one_chunk():
    harness = Harness(make_config(max_decode_rounds=4))
    harness.make(prompt=(1, 2), max_tokens=9)
    assert [[chunk.token_ids for chunk in harness.step()] for _ in range(3)] == [
        [[3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]


def test_an_inner_chunk_gives_nothing():
    harness = Harness(make_config(max_num_batched_tokens=4))
    harness.make(prompt=range(9))
    assert harness.step() == []


@pytest.mark.parametrize(("stop_token_ids", "stop_reason"), [((5,), 5), (None, None)])
def test_a_stop_id_ends_a_row_and_is_delivered(stop_token_ids, stop_reason):
    harness = Harness(make_config(max_decode_rounds=4))
    harness.make(prompt=(1, 2), max_tokens=9, stop_ids=(5,), stop_token_ids=stop_token_ids)
    harness.run()
    end = harness.ends["r0000", 0]
    assert (end.token_ids, end.finish_reason, end.stop_reason) == ([4, 5], "stop", stop_reason)


def test_a_stop_id_as_last_token_is_a_stop():
    harness = Harness()
    harness.make(prompt=(1, 2), max_tokens=2, stop_ids=(4,))
    harness.run()
    assert harness.ends["r0000", 0].finish_reason == "stop"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_steps_in_flight_give_nothing_to_a_row_that_stopped(depth: int):
    harness = Harness(depth=depth)
    harness.make(prompt=(1, 2), max_tokens=9, stop_ids=(4,))
    harness.run()
    assert harness.outputs["r0000", 0] == [3, 4]


def test_pages_and_slot_are_free_after_the_end():
    harness = Harness()
    harness.make(prompt=range(6), max_tokens=1)
    harness.run()
    assert (harness.pool.num_held, harness.pool.num_idle, harness.scheduler.num_running) == (0, 1, 0)


def test_commits_keep_the_order_of_plans():
    harness = Harness(depth=2)
    harness.make()
    harness.plan(), harness.plan()
    plan, result = harness.in_flight[1]
    with pytest.raises(ValueError, match="before step 0"):
        harness.scheduler.commit(plan, result, 1.0)


def test_a_row_the_device_stopped_without_reason_ends_with_an_error():
    harness = Harness()
    harness.make(prompt=(1,), max_tokens=9)
    harness.make(prompt=(20,), max_tokens=9)
    harness.step()
    plan = harness.plan()
    bad, good = harness.scheduler.commit(plan, StepResult([[], [22]]), 2.0)
    assert bad.finish_reason == "error" and isinstance(bad.error, StepFailed)
    assert good.finish_reason is None
    assert harness.scheduler.num_running == 1


def test_logprobs_are_trimmed_to_what_a_request_asked_for():
    harness = Harness()
    for logprobs in (None, 0, 3):
        harness.make(logprobs=logprobs)
    chunks = harness.step()
    assert [chunk.logprobs and len(chunk.logprobs[0].top) for chunk in chunks] == [None, 0, 3]
    assert isinstance(chunks[1].logprobs[0], TokenLogprobs)


def test_the_last_chunk_has_the_statistics():
    harness = Harness(make_config(max_num_batched_tokens=4))
    harness.now = 10.0
    harness.make(prompt=range(6), max_tokens=3, arrival=7.0)
    harness.run()
    stats = harness.ends["r0000", 0].stats
    assert (stats.arrival, stats.scheduled, stats.first_token, stats.finished) == (7.0, 10.0, 12.0, 14.0)
    assert (stats.num_prompt_tokens, stats.num_output_tokens, stats.num_preemptions) == (6, 3, 0)


def test_a_resumed_row_keeps_its_first_start_and_cached_tokens():
    harness = Harness()
    harness.now = 5.0
    harness.make(prompt=range(6), max_tokens=9)
    harness.step()
    harness.scheduler._preempt(harness.scheduler._running[0])
    harness.run()
    stats, metrics = harness.ends["r0000", 0].stats, harness.scheduler.metrics
    assert (stats.scheduled, stats.num_cached_tokens, stats.num_preemptions) == (5.0, 0, 1)
    assert metrics.queue_seconds.count == 1


# ---- cancel


def test_a_running_request_is_cancelled_at_once():
    harness = Harness(depth=1)
    harness.make(prompt=range(6), max_tokens=9, n=2)
    harness.step()
    chunks = harness.cancel("r0000")
    assert [(chunk.index, chunk.finish_reason, chunk.token_ids) for chunk in chunks] == [
        (0, "abort", []), (1, "abort", [])]
    assert (harness.pool.num_held, harness.scheduler.has_work) == (0, False)
    assert harness.commit() == []


def test_a_waiting_request_is_cancelled():
    harness = Harness()
    harness.make()
    assert len(harness.cancel("r0000")) == 1
    assert harness.plan() is None


def test_one_sample_is_cancelled_alone():
    harness = Harness()
    harness.make(n=3)
    assert [chunk.index for chunk in harness.cancel("r0000", 1)] == [1]
    harness.run()
    assert [harness.ends["r0000", index].finish_reason for index in range(3)] == ["length", "stop", "length"]


def test_cancelling_what_is_gone_does_nothing():
    harness = Harness()
    harness.make(n=2)
    assert harness.cancel("nobody") == harness.cancel("r0000", 7) == []
    harness.cancel("r0000")
    assert harness.cancel("r0000") == []


def test_the_slot_of_a_cancelled_row_can_be_reused_while_its_step_is_in_flight():
    harness = Harness(make_config(max_num_seqs=1, num_pages=12), depth=1)
    harness.make(prompt=range(6), max_tokens=9)
    harness.plan()
    harness.cancel("r0000")
    harness.make(prompt=range(30, 36), max_tokens=9)
    assert harness.plan().init_rows[0].slot == 0
    harness.run()
    harness.check_outputs()


def test_tokens_of_a_cancelled_row_stay_in_the_prefix_cache():
    harness = Harness()
    harness.make(prompt=range(9), max_tokens=9)
    harness.step()
    harness.cancel("r0000")
    harness.make(prompt=range(9))
    assert harness.plan().starts == (8,)


# ---- metrics


def test_metrics_count_what_was_done():
    harness = Harness(make_config(max_num_batched_tokens=4))
    harness.make(prompt=range(6), max_tokens=3)
    harness.make(prompt=(9,), max_tokens=2, stop_ids=(10,))
    harness.make(prompt=(9,))
    harness.cancel("r0002")
    harness.run()
    metrics = harness.scheduler.metrics
    assert metrics.finished == {"length": 1, "stop": 1, "abort": 1}
    assert (metrics.prompt_tokens, metrics.generated_tokens) == (7, 4)
    assert (metrics.prefill_steps, metrics.decode_steps) == (2, 2)
    assert (metrics.first_token_seconds.count, metrics.inter_token_seconds.count) == (2, 2)
    assert (metrics.queue_seconds.count, metrics.request_seconds.count) == (2, 3)


def test_metrics_count_failures_and_preemptions():
    harness = Harness()
    harness.make(max_tokens=9)
    harness.step()
    harness.fail()
    harness.step()
    harness.scheduler._preempt(harness.scheduler._running[0])
    assert (harness.scheduler.metrics.failed_steps, harness.scheduler.metrics.preemptions) == (1, 1)


def test_tokens_before_a_row_broke_are_counted():
    harness = Harness(make_config(max_decode_rounds=4))
    for start in (1, 7):
        harness.make(prompt=(start, start + 1), max_tokens=9)
    harness.step()
    plan = harness.scheduler.plan()
    counted = harness.scheduler.metrics.generated_tokens
    chunks = harness.scheduler.commit(plan, StepResult([[4, 5], [10, 11, 12, 13]], broken=[0]), 0.0)
    assert [(chunk.token_ids, chunk.finish_reason) for chunk in chunks] == [([4, 5], "error"), ([10, 11, 12, 13], None)]
    assert harness.scheduler.metrics.generated_tokens - counted == 6
