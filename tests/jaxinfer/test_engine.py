"""The real engine, steps, sampler and pages under the counting model: every answer is known beforehand."""


import pytest
from counting import counted, new_engine, new_executor, request, small_config
from counting_mixes import arrivals, check_mix, ids_of, run
from hypothesis import given, settings

from jaxinfer.engine import FAILURE_WINDOW, MAX_FAILURES
from jaxinfer.errors import StepFailed
from jaxinfer.types import StepKind


@pytest.fixture(scope="module")
def executor():
    return new_executor(small_config())


@settings(max_examples=120)
@given(arrivals())
def test_any_mix_gives_each_request_its_own_answer(executor, mix):
    check_mix(new_engine(executor), mix)


def test_decode_rounds_are_fused_only_while_nobody_waits(executor):
    engine = new_engine(executor)
    plans = record_plans(engine)
    for index in range(6):  # two more than there are slots
        engine.add(request(str(index), [index * 10], 12, temperature=0.0))
    run(engine)
    decodes = [(plan.num_rounds, waiting) for plan, waiting in plans if plan.kind is StepKind.DECODE]
    assert {rounds for rounds, waiting in decodes if waiting} == {1}
    assert max(rounds for rounds, waiting in decodes if not waiting) == executor.config.max_decode_rounds


def record_plans(engine):
    plans, plan = [], engine.scheduler.plan

    def recording(**options):
        made = plan(**options)
        if made is not None:
            plans.append((made, engine.scheduler.num_waiting))
        return made

    engine.scheduler.plan = recording
    return plans


def test_the_next_step_is_dispatched_before_the_last_is_read(executor):
    engine = new_engine(executor)
    events = []
    dispatch, read = executor.dispatch, executor.read
    engine.runner = Spy(executor, lambda plan: (events.append(("dispatch", plan.step_id)), dispatch(plan))[1],
                        lambda step: (events.append(("read", step.plan.step_id)), read(step))[1])
    engine.add(request("a", [1], 20, temperature=0.0))
    run(engine)
    for step_id in range(3):
        assert events.index(("dispatch", step_id + 1)) < events.index(("read", step_id))


class Spy:
    def __init__(self, executor, dispatch, read):
        self.dispatch, self.read, self.reset = dispatch, read, executor.reset


def test_host_time_is_the_step_without_the_wait_for_the_device(executor):
    engine, now = new_engine(executor), [0.0]
    engine._clock = lambda: now[0]

    def spent(seconds, work):
        def slow(*args):
            now[0] += seconds
            return work(*args)
        return slow

    engine.runner = Spy(executor, spent(1.0, executor.dispatch), spent(10.0, executor.read))
    engine.add(request("a", [1], 6, temperature=0.0))
    run(engine)
    metrics = engine.scheduler.metrics
    steps = metrics.prefill_steps + metrics.decode_steps
    assert metrics.step_seconds.count == metrics.host_seconds.count == steps
    assert metrics.step_seconds.sum - metrics.host_seconds.sum == pytest.approx(10.0 * steps)
    assert metrics.host_seconds.sum in (pytest.approx(steps), pytest.approx(steps - 1))  # the first had none to commit


def test_a_hundred_percent_prefix_hit_still_computes_the_last_token(executor):
    engine = new_engine(executor)
    prompt = list(range(32))  # exactly eight pages
    for id in ("first", "second"):
        engine.add(request(id, prompt, 5, temperature=0.0, arrival=float(id == "second")))
        chunks = run(engine)
        assert ids_of(chunks[id, 0]) == [32, 33, 34, 35, 36]
    assert chunks["second", 0][-1].stats.num_cached_tokens == 28


def test_salts_keep_prefixes_apart(executor):
    engine = new_engine(executor)
    for index, salt in enumerate(["tenant a", "tenant b", "tenant a"]):
        engine.add(request(salt + str(index), range(32), 3, temperature=0.0, salt=salt, arrival=float(index)))
        chunks = run(engine)
        assert chunks[salt + str(index), 0][-1].stats.num_cached_tokens == (28 if index == 2 else 0)


def test_a_failed_step_is_recomputed_and_nobody_notices(executor):
    engine = new_engine(executor)
    fail_at = {3, 9}
    dispatch, count = executor.dispatch, iter(range(10**6))

    def failing(plan):
        if next(count) in fail_at:
            raise RuntimeError("injected")
        return dispatch(plan)

    engine.runner = Spy(executor, failing, executor.read)
    requests = [request(str(index), [index * 7, index * 7 + 1], 20, temperature=1.0) for index in range(5)]
    for one in requests:
        engine.add(one)
    chunks = run(engine)
    assert all(ids_of(chunks[one.id, 0]) == counted(one) for one in requests)
    assert next(count) > max(fail_at)


def test_steps_that_keep_failing_end_the_engine(executor):
    engine = new_engine(executor)
    calls = []

    def failing(plan):
        calls.append(plan)
        raise RuntimeError("injected")

    engine.runner = Spy(executor, failing, executor.read)
    engine.add(request("a", [1], 5))
    with pytest.raises(StepFailed, match=str(MAX_FAILURES)):
        for _ in range(10):
            engine.step()
    assert len(calls) == MAX_FAILURES


def test_steps_are_timed_from_the_end_of_the_one_before(executor):
    """But for one behind which the device had nothing: it may have waited for work."""
    now, taken = 0.0, []
    engine = new_engine(executor, clock=lambda: now)

    def read(step):
        nonlocal now
        now += 1.0 + len(taken)
        return executor.read(step)

    def commit(plan, result, *rest, real=engine.scheduler.commit):
        taken.append(result.seconds)
        return real(plan, result, *rest)

    engine.runner, engine.scheduler.commit = Spy(executor, executor.dispatch, read), commit
    for index in range(2):
        engine.add(request(str(index), [1], 12))
        run(engine)
        now += 100.0
    half, every = len(taken) // 2, [float(number) for number in range(1, len(taken) + 1)]
    assert half > 2 and taken == [None, *every[1:half], None, *every[half + 1:]]


def test_failures_far_apart_do_not_end_the_engine(executor):
    now, fails = 0.0, False
    engine = new_engine(executor, clock=lambda: now)

    def failing(plan):
        nonlocal fails
        if fails:
            fails = False
            raise RuntimeError("injected")
        return executor.dispatch(plan)

    engine.runner = Spy(executor, failing, executor.read)
    for index in range(MAX_FAILURES + 2):
        now, fails = now + FAILURE_WINDOW / (MAX_FAILURES - 1) + 1, True
        one = request(str(index), [1, index], 5)
        engine.add(one)
        assert ids_of(run(engine)[one.id, 0]) == counted(one)
    assert engine.scheduler.metrics.failed_steps == MAX_FAILURES + 2


def test_lower_priority_numbers_run_first(executor):
    engine = new_engine(executor)
    for index in range(12):
        engine.add(request(str(index), [index], 6, temperature=0.0, priority=-index, arrival=0.0))
    chunks = run(engine)
    first = {id: parts[0].stats or parts[-1].stats for (id, _), parts in chunks.items()}
    order = sorted(first, key=lambda id: first[id].scheduled)
    assert set(order[:4]) == {"8", "9", "10", "11"}
