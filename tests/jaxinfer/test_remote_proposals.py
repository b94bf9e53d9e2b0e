"""Proposals from outside: what is left of them against a search in plain Python, and every answer is its own whoever
proposes.
"""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import VOCAB, counted, request
from counting_mixes import arrivals, check_mix, ids_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_drafting import Counting, Failing, Liar, engine_of, new_executor

from jaxinfer import row_state
from jaxinfer.acceptance import Candidates
from jaxinfer.drafter import Prefilled, Round
from jaxinfer.errors import InvalidConfig
from jaxinfer.executor import Executor
from jaxinfer.model import Rows
from jaxinfer.remote_drafts import LIKELIEST, TRIED_STEPS
from jaxinfer.remote_proposals import NOTHING, Entered, RemoteProposals, candidates_of, remaining
from jaxinfer.start_options import Options


@pytest.fixture(scope="module")
def executor() -> Executor:
    return new_executor()


def left_of(proposed: list[int], first: int, row: list[int]) -> list[int]:
    """What of a proposal lies behind the row."""
    done = len(row) - first
    return proposed[done:] if done >= 0 and row[first:] == proposed[:done] else []


@given(data=st.data())
def test_what_is_left_is_what_a_search_finds(data):
    width, most = 6, 3
    rows, proposals = [], []
    for _ in range(4):
        row = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=20))
        first = data.draw(st.integers(max(len(row) - 8, 0), len(row) + 1))
        follows = data.draw(st.booleans())
        proposed = (row[first:] if follows else []) + data.draw(st.lists(st.integers(0, 1), max_size=width))
        rows.append(row)
        proposals.append((first, proposed[:width]))
    said = np.full((4, width), NOTHING)
    entered = np.full((4, width), NOTHING)
    for slot, (row, (_, proposed)) in enumerate(zip(rows, proposals, strict=True)):
        entered[slot, :len(proposed)] = proposed
        for position in range(max(len(row) - width, 0), len(row)):
            said[slot, position % width] = row[position]
    state = Entered(jnp.array(entered), jnp.array([first for first, _ in proposals]), jnp.array(said), jnp.array(False))
    slots = jnp.array([2, 0, 3, 1])
    tokens, left = remaining(state, slots, jnp.array([len(rows[slot]) for slot in slots.tolist()]), most)
    for index, slot in enumerate(slots.tolist()):
        wanted = left_of(proposals[slot][1], proposals[slot][0], rows[slot])
        assert left[index] == len(wanted)
        assert tokens[index, :min(len(wanted), most)].tolist() == wanted[:most]


def test_a_prefill_step_clears_slots_that_begin_and_remembers_what_decode_rows_said():
    drafter = RemoteProposals(num_drafted=2, num_kept=4, max_num_seqs=3)
    state = drafter.enter_proposals(drafter.new_state(1, 1), jnp.array([0, 1, 2, 9]), jnp.array([6, 6, 6, 6]),
                                    jnp.array([[1, 2, 3, 4]] * 4))  # fmt: skip
    # Slot 1 decodes its token 1 at position 6, slot 0 begins with 3 tokens; then there is padding.
    rows = Rows(jnp.array([7, 3, 0]), jnp.zeros((3, 1), int), jnp.array([0, 1, 4, 4]), jnp.array([1, 1, 2]))
    seen = Prefilled(jnp.array([1, 7, 8, 9, 0]), jnp.array([6, 0, 1, 2, 0]), rows, jnp.array([1, 0, 99]),
                     jnp.array([True, False, False]), jnp.zeros((5, 1)))  # fmt: skip
    state = drafter.observe_prefill(None, state, cast(Any, None), seen)
    assert state.proposed[:, 0].tolist() == [NOTHING, 1, 1, NOTHING]
    tokens, left = remaining(state, jnp.array([0, 1, 2]), jnp.array([7, 7, 7]), 2)
    assert left.tolist() == [0, 3, 0] and tokens[1].tolist() == [2, 3]


def test_what_rounds_bring_is_remembered():
    drafter = RemoteProposals(num_drafted=2, num_kept=4, max_num_seqs=1)
    state = drafter.enter_proposals(drafter.new_state(1, 1), jnp.array([0]), jnp.array([6]), jnp.array([[1, 2, 3, 4]]))
    rows = row_state.empty(1, 1, 8, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    rows = replace(rows, kv_len=jnp.array([5, 0]))
    for tokens, left in (([1, 2, 3], 1), ([1, 2, -1], 2), ([1, 9, 3], 0)):
        count = sum(token >= 0 for token in tokens)
        seen = Round(jnp.array([0]), jnp.array([True]), jnp.zeros((1, 1), int), jnp.array([tokens]),
                     jnp.array([count]), jnp.zeros((1, 3, 1)))  # fmt: skip
        after = drafter.observe_round(None, state, rows, seen)
        assert remaining(after, jnp.array([0]), jnp.array([6 + count]), 2)[1].tolist() == [left]


@settings(max_examples=60)
@given(mix=arrivals(), seed=st.integers(0, 2**16))
def test_any_mix_gives_each_request_its_own_answer_whatever_is_proposed(executor, mix, seed):
    """Stop ids, minimum lengths, log-probabilities, priorities, cancels, preemption and prefix hits among them."""
    source = Liar(seed)
    check_mix(engine_of(executor, source), mix)
    assert not source.rows, "rows that ended are forgotten"


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("seed", [None, 11])
def test_proposals_are_kept_though_they_come_a_step_late(executor, late, seed):
    """And nothing else: a right drafter is never refused, behind chunked prompts, prefix hits and mixed steps."""
    source = Counting(late)
    engine = engine_of(executor, source)
    requests = [request(str(index), range(length), 40, temperature=temperature, arrival=float(index), given=seed)
                for index, (length, temperature) in enumerate([(1, 0.0), (40, 0.0), (40, 1.0), (9, 1.0)])]
    for one in requests:
        engine.add(one)
    chunks = run(engine)
    assert [ids_of(chunks[one.id, 0]) for one in requests] == [counted(one) for one in requests]
    metrics = engine.metrics()
    assert metrics["accepted_tokens"] == metrics["draft_tokens"] > 40
    assert metrics["remote_proposals"]["entered"] > 4 and not metrics["remote_proposals"]["malformed"]
    assert not source.rows


def test_what_was_wrong_is_counted(executor):
    class Wrong(Counting):
        def tell(self, name, position, tokens, terms=LIKELIEST):
            super().tell(name, position, tokens, terms)
            if position:  # one answer a row, which is taken when the row begins
                self._answers.pop(name)

        def answer(self, name, row):
            kinds = {0: (len(row), (VOCAB,)), 1: (len(row) + 1, (1,)), 2: (len(row) - 1, (250, 251)),
                     3: (len(row) - 1, (row[-1],)), 4: (len(row), ())}  # fmt: skip
            position, tokens = kinds[name]
            return super().answer(name, row)._replace(position=position, tokens=tokens)

    engine = engine_of(executor, Wrong())
    for index in range(5):
        one = request(str(index), range(5), 2, temperature=0.0)
        engine.add(one)
        assert ids_of(run(engine)[one.id, 0]) == [5, 6]
    assert engine.metrics()["remote_proposals"] == {"entered": 0, "late": 1, "wrong": 1, "malformed": 3}
    assert engine.metrics()["draft_tokens"] == 0


def test_a_source_that_raises_costs_proposals_only(executor, caplog):
    engine = engine_of(executor, Failing())
    one = request("one", range(5), 60, temperature=0.0)
    engine.add(one)
    assert ids_of(run(engine)["one", 0]) == counted(one)
    assert engine.metrics()["failed_steps"] == 0
    assert [record.message for record in caplog.records] == [
        "the source of proposals failed; from now on nothing is drafted"]  # fmt: skip


def test_rows_are_told_of_again_after_a_failed_step(executor, caplog):
    source = Counting()
    engine = engine_of(executor, source)
    one = request("one", range(5), 60, temperature=0.0)
    engine.add(one)
    chunks = {("one", 0): []}
    for _ in range(4):
        chunks["one", 0] += engine.step()
    read, engine.runner.read = engine.runner.read, partial(fail_once, engine.runner)
    try:
        chunks["one", 0] += [chunk for found in run(engine).values() for chunk in found]
    finally:
        engine.runner.read = read
    assert ids_of(chunks["one", 0]) == counted(one)
    assert engine.metrics()["failed_steps"] == 1
    assert source.ended == {0, 1}


def fail_once(runner, step):
    del runner.read
    raise RuntimeError("the device failed")


def test_cancelled_rows_are_forgotten_at_once(executor):
    source = Counting()
    engine = engine_of(executor, source)
    engine.add(request("one", range(5), 60, temperature=0.0))
    engine.step()
    assert set(source.rows) == {0}
    engine.cancel("one")
    assert not source.rows and source.ended == {0}
    engine.drain()
    engine.close()
    assert source.closed


def test_a_drafter_is_waited_for_while_its_proposals_fit(executor):
    """And steps then have one round; where it is of no use they have several again, but for a few that try."""
    engine = engine_of(executor, Counting())
    remote = engine._remote
    waits = record_waits(remote)
    engine.add(request("good", range(5), 60, temperature=0.0))
    run(engine)
    assert remote.is_useful and len(waits) > 5
    late = engine_of(executor, Counting(late=100))
    remote, waits, rounds = late._remote, record_waits(late._remote), []
    for index in range(12):
        late.add(request(str(index), range(5), 60, temperature=0.0))
        while late.has_work:
            late.step()
            if late._in_flight is not None:
                rounds.append(late._in_flight.plan.num_rounds)
    assert not remote.is_useful and TRIED_STEPS - 3 < len(waits) <= TRIED_STEPS
    assert max(rounds[:TRIED_STEPS]) == 1 and max(rounds[TRIED_STEPS:]) == 4


def record_waits(remote):
    waits, wait = [], remote.wait
    remote.wait = lambda is_done: waits.append(wait(is_done))
    return waits


def test_measured_rounds_make_all_proposals_and_leave_no_trace(executor):
    executor.reset()
    executor.measure_rounds()
    assert not executor.signature.state.kv_pages.draft.always


@pytest.mark.parametrize("options", [{}, {"draft_address": "::1:50051"},
                                     {"draft_address": "drafts.example:1", "trust_draft_probs": True}])  # fmt: skip
def test_addresses(options):
    found = Options(model="demo", **options)
    found.validate()
    assert found.drafter == ("remote" if options else None)


def test_the_state_takes_what_is_counted():
    """The one flag beside it is not worth a line of the memory plan."""
    for num_candidates in (0, 19):
        drafter = RemoteProposals(num_drafted=2, num_kept=12, max_num_seqs=3, num_candidates=num_candidates)
        leaves = jax.tree.leaves(drafter.struct(1, 1))
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == drafter.fixed_bytes + 1


def test_candidates_are_entered_and_found_where_their_tokens_are():
    drafter = RemoteProposals(num_drafted=2, num_kept=4, max_num_seqs=3, num_candidates=3)
    tokens = jnp.arange(8).reshape(2, 4)
    ids = jnp.arange(24).reshape(2, 4, 3)
    state = drafter.enter_proposals(drafter.new_state(1, 1), jnp.array([2, 9]), jnp.array([6, 6]), tokens,
                                    Candidates(ids, ids / 100))  # fmt: skip
    found = candidates_of(state, jnp.array([2, 0]), jnp.array([7, 3]), 2)
    assert found.ids[0].tolist() == [[3, 4, 5], [6, 7, 8]] and not found.chances[1].any()
    np.testing.assert_array_equal(found.chances[0], ids[0, 1:3] / 100)


@pytest.mark.parametrize(("options", "words"), [
    ({"draft_address": "there"}, "draft_address: must be host:port .* got 'there'"),
    ({"draft_address": ":5"}, "host:port"),
    ({"draft_address": "there:0"}, "host:port"),
    ({"draft_address": "there:65536"}, "65535"),
    ({"draft_address": "there:x"}, "host:port"),
    ({"draft_address": 5}, "draft_address: must be a string or None, got 5"),
    ({"trust_draft_probs": True}, "trust_draft_probs: is about the drafter at draft_address, which is None"),
    ({"trust_draft_probs": True, "draft_model": "m"}, "trust_draft_probs: .* draft_address"),
    ({"trust_draft_probs": 1, "draft_address": "h:1"}, "trust_draft_probs: must be True or False, got 1"),
    ({"draft_address": "h:1", "draft_model": "m"}, "draft_address: 'h:1' .* draft_model='m'"),
    ({"draft_address": "h:1", "speculation": "ngram"}, "draft_address: 'h:1' .* speculation='ngram'"),
])  # fmt: skip
def test_options_that_cannot_be(options, words):
    with pytest.raises(InvalidConfig, match=words):
        Options(model="demo", **options).validate()
