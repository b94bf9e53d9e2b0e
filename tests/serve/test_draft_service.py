"""The drafter's side over a real channel, against the counting engine: it runs what is wanted and no more."""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import grpc
import pytest
from counting_engine import VOCAB_SIZE, CountingEngine, make_core
from serving import Served, eventually, serving

from jaxinfer.errors import Overloaded
from jaxinfer.protos.v1 import draft_pb2 as pb
from jaxinfer.protos.v1 import draft_pb2_grpc as pb_grpc


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
