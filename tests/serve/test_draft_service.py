"""The drafter's side over a real channel, against the counting engine: it runs what is wanted and no more."""

import queue
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from counting_engine import VOCAB_SIZE, CountingEngine, make_core
from serving import Served, eventually, serving

from jaxinfer.errors import Overloaded
from jaxinfer.protos.v1 import draft_pb2 as pb
from jaxinfer.protos.v1 import draft_pb2_grpc as pb_grpc
from jaxinfer.types import MAX_CANDIDATES
from serve import draft_service


class Caller:
    """One open stream."""

    def __init__(self, stub: pb_grpc.DraftServiceStub):
        self._requests: queue.SimpleQueue[pb.DraftRequest | None] = queue.SimpleQueue()
        self.call = stub.Draft(iter(self._requests.get, None))
        self.done: Future[grpc.StatusCode] = Future()
        self.responses: queue.SimpleQueue[pb.DraftResponse] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for response in self.call:
                self.responses.put(response)
        except grpc.RpcError:
            pass  # the status says it
        self.done.set_result(self.call.code())

    def send(self, sequence: int, position: int = 0, tokens=(), **more) -> None:
        self._requests.put(pb.DraftRequest(sequence=sequence, position=position, token_ids=tokens, **more))

    def end(self) -> None:
        self._requests.put(None)

    def answer(self) -> tuple[int, int, list[int]]:
        found = self.responses.get(timeout=10)
        return found.sequence, found.position, list(found.token_ids)


@contextmanager
def calling(served: Served) -> Iterator[Caller]:
    with grpc.insecure_channel(served.server.address) as channel:
        caller = Caller(pb_grpc.DraftServiceStub(channel))
        yield caller
        caller.end()
        caller.call.cancel()
        caller.done.result(timeout=10)


@pytest.fixture
def caller(stepped: Served) -> Iterator[Caller]:
    with calling(stepped) as found:
        yield found


def rows_of(served: Served) -> list[tuple[tuple[int, ...], int]]:
    """Prompt and wanted tokens of each request in the engine."""
    return [(row.request.prompt, row.request.max_tokens) for row in served.engine.rows.values()]


def begin(served: Served, caller: Caller, sequence: int, tokens, **more) -> None:
    caller.send(sequence, 0, tokens, **more)
    eventually(lambda: any(prompt == tuple(tokens) for prompt, _ in rows_of(served)))


def test_proposals_follow_the_tokens(stepped: Served, caller: Caller):
    begin(stepped, caller, 7, [1, 2, 3], num_wanted=4)
    assert rows_of(stepped) == [((1, 2, 3), 4)]
    for ahead in ([4], [4, 5], [4, 5, 6], [4, 5, 6, 7]):
        stepped.engine.step()
        assert caller.answer() == (7, 3, ahead)
    assert rows_of(stepped) == []


def test_accepted_guesses_let_the_request_run(stepped: Served, caller: Caller):
    begin(stepped, caller, 1, [1, 2, 3], num_wanted=8)
    stepped.engine.step()
    assert caller.answer() == (1, 3, [4])
    caller.send(1, 3, [4, 5])  # one more than it has said
    caller.send(2, 0, [9], num_wanted=8)
    eventually(lambda: len(rows_of(stepped)) == 2)
    assert not stepped.engine.cancelled
    for ahead in ((), [6], [6, 7]):
        stepped.engine.step()
        found = {answer[0]: answer for answer in (caller.answer() for _ in range(1 + bool(ahead)))}
        assert found.get(1, (1, 5, [])) == (1, 5, list(ahead))


def test_more_is_guessed_once_half_of_it_is_used(stepped: Served, caller: Caller):
    begin(stepped, caller, 1, [1, 2, 3], num_wanted=4)
    for _ in range(4):
        stepped.engine.step()
        caller.answer()
    caller.send(1, 3, [4])
    caller.send(1, 4, [5])
    eventually(lambda: rows_of(stepped) == [((1, 2, 3, 4, 5, 6, 7), 2)])
    stepped.engine.step()
    assert caller.answer() == (1, 5, [6, 7, 8])


@pytest.mark.parametrize("accepted", [[9], [4, 5, 6, 7, 8]], ids=["other", "far ahead"])
def test_guesses_that_are_worth_nothing_are_cancelled(stepped: Served, caller: Caller, accepted):
    begin(stepped, caller, 1, [1, 2, 3], num_wanted=4)
    stepped.engine.step()
    assert caller.answer() == (1, 3, [4])
    caller.send(1, 3, accepted)
    eventually(lambda: rows_of(stepped) == [((1, 2, 3, *accepted), 4)])
    assert len(stepped.engine.cancelled) == 1
    stepped.engine.step()
    assert caller.answer() == (1, 3 + len(accepted), [accepted[-1] + 1])


def test_probabilities_come_where_they_are_wanted(stepped: Served, caller: Caller):
    begin(stepped, caller, 1, [1, 2, 3], num_wanted=4, with_probabilities=True)
    stepped.engine.step()
    assert list(caller.responses.get(timeout=10).probabilities) == pytest.approx([2.718281828**-1.5])


def test_distributions_come_where_they_are_wanted(stepped: Served, caller: Caller):
    """Of the likeliest ids at the wanted temperature. The counting engine's are its token + 1, itself, + 3, + 4, at
    log-probabilities of -0.5, -1.5, -2.5 and -3.5.
    """
    begin(stepped, caller, 1, [1, 2, 3], num_wanted=2, temperature=0.5, num_candidates=3, with_probabilities=True)
    (row,) = stepped.engine.rows.values()
    params = row.request.params
    assert (params.temperature, params.top_k, params.logprobs, params.seed) == (0.5, 3, 4, None)
    stepped.engine.step()
    caller.answer()
    stepped.engine.step()
    found = caller.responses.get(timeout=10)
    assert list(found.token_ids) == [4, 5] and found.num_candidates == 3
    assert list(found.candidate_ids) == [5, 4, 7, 6, 5, 8]
    weights = np.exp(np.array([-0.5, -1.5, -2.5]) / 0.5)
    np.testing.assert_allclose(found.candidate_probabilities, np.tile(weights / weights.sum(), 2), rtol=1e-6)
    assert list(found.probabilities) == pytest.approx([2.718281828**-1.5] * 2)


def test_distributions_lie_beside_their_tokens_as_these_are_accepted(stepped: Served, caller: Caller):
    begin(stepped, caller, 1, [1, 2, 3], num_wanted=4, temperature=1.0, num_candidates=1)
    for _ in range(4):
        stepped.engine.step()
        caller.answer()
    caller.send(1, 3, [4, 5])
    eventually(lambda: rows_of(stepped) == [((1, 2, 3, 4, 5, 6, 7), 2)])
    stepped.engine.step()
    found = caller.responses.get(timeout=10)
    assert (list(found.token_ids), list(found.candidate_ids)) == ([6, 7, 8], [7, 8, 9])


@pytest.mark.parametrize("terms", [{"temperature": 0.7}, {"num_candidates": 5},
                                   {"temperature": 0.04, "num_candidates": 5},
                                   {"temperature": 1.0, "num_candidates": -5}])  # fmt: skip
def test_without_a_distribution_the_likeliest_tokens_come(stepped: Served, caller: Caller, terms):
    begin(stepped, caller, 1, [1, 2, 3], **terms)
    assert [row.request.params.temperature for row in stepped.engine.rows.values()] == [0.0]
    stepped.engine.step()
    assert not caller.responses.get(timeout=10).HasField("num_candidates")


@pytest.mark.parametrize("terms", [{"temperature": float("nan")}, {"temperature": float("inf")},
                                   {"cache_salt": "x" * 300}])  # fmt: skip
def test_terms_that_cannot_be_get_no_proposals(stepped: Served, caller: Caller, terms):
    caller.send(1, 0, [1], num_candidates=5, **terms)
    caller.send(2, 0, [1], temperature=1.0, num_candidates=2**31 - 1)
    eventually(lambda: len(rows_of(stepped)) == 1)
    (row,) = stepped.engine.rows.values()
    assert row.request.params.top_k == MAX_CANDIDATES


def test_pages_are_shared_within_a_salt_only(stepped: Served, caller: Caller):
    begin(stepped, caller, 1, [1], cache_salt="tenant")
    begin(stepped, caller, 2, [2])
    assert sorted(row.request.cache_salt for row in stepped.engine.rows.values()) == ["", "tenant"]
    caller.send(1, 1, [9])  # what goes elsewhere begins another request, of the same salt
    eventually(lambda: ((1, 9), 1) in rows_of(stepped))
    assert sorted(row.request.cache_salt for row in stepped.engine.rows.values()) == ["", "tenant"]


def test_seeds_of_drafts_are_nobody_elses(stepped: Served, caller: Caller):
    """Those of other requests follow from a number, which the engine elsewhere may have too."""
    assert stepped.core is not None
    stepped.core.intake._seeds = random.Random(0)
    for sequence in range(3):
        begin(stepped, caller, sequence, [sequence], temperature=1.0, num_candidates=2)
    numbers = random.Random(0)
    theirs = {numbers.getrandbits(63) for _ in range(100)}
    ours = {row.request.seed for row in stepped.engine.rows.values()}
    assert len(ours) == 3 and not ours & theirs


def end_sequences(caller: Caller) -> None:
    for sequence in range(3):
        caller.send(sequence, ended=True)


def send_what_does_not_fit(caller: Caller) -> None:
    for sequence, position in ((0, 2), (1, -5), (2, 100)):
        caller.send(sequence, position, [1])


@pytest.mark.parametrize("how", [end_sequences, send_what_does_not_fit, lambda caller: caller.end(),
                                 lambda caller: caller.call.cancel()],
                         ids=["ended", "misplaced", "closed", "cancelled"])  # fmt: skip
def test_nothing_runs_for_whom_it_is_not_wanted(stepped: Served, caller: Caller, how):
    for sequence in range(3):
        begin(stepped, caller, sequence, [1, 2, sequence])
    how(caller)
    eventually(lambda: not rows_of(stepped))


def test_what_the_model_cannot_take_is_no_error(stepped: Served, caller: Caller):
    for sequence, tokens in enumerate(([VOCAB_SIZE], [-1], [], [2**31 - 1])):
        caller.send(sequence, 0, tokens)
    caller.send(9, 0, [1] * 400_000)  # beyond its longest context
    caller.send(10, 5, [1])  # never began
    stepped.engine.submit_error = Overloaded("full")
    caller.send(11, 0, [1])
    caller.send(11, 1, [2])
    time.sleep(0.1)
    stepped.engine.submit_error = None
    caller.send(11, 2, [3])
    eventually(lambda: rows_of(stepped) == [((1, 2, 3), 1)])


def test_a_stop_does_not_wait_for_drafts():
    with serving(make_core(CountingEngine()), drain_seconds=60) as served, calling(served) as caller:
        begin(served, caller, 1, [1])
        began = time.monotonic()
        assert served.call(served.server.stop())
        assert time.monotonic() - began < 10
        assert caller.done.result(timeout=10) is grpc.StatusCode.OK
        assert not rows_of(served)


def test_a_server_that_loads_says_so():
    with serving(None) as served, calling(served) as caller:
        assert caller.done.result(timeout=10) is grpc.StatusCode.UNAVAILABLE


def test_tokens_of_all_streams_are_bounded(stepped: Served, monkeypatch: pytest.MonkeyPatch):
    """What does not fit gets no proposals; what ends makes room."""
    monkeypatch.setattr(draft_service, "MOST_TOKENS", 10)
    with calling(stepped) as first, calling(stepped) as second:
        begin(stepped, first, 1, [1] * 8)
        second.send(2, 0, [2] * 3)
        begin(stepped, second, 3, [3] * 2)
        assert [prompt[0] for prompt, _ in rows_of(stepped)] == [1, 3]
        first.send(1, ended=True)
        eventually(lambda: len(rows_of(stepped)) == 1)
        begin(stepped, second, 2, [2] * 8)
    eventually(lambda: not rows_of(stepped))
    with calling(stepped) as third:
        begin(stepped, third, 4, [4] * 10)
