"""An engine and its drafter over a real channel: good proposals are kept, and whatever else comes costs speed only."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from counting import counted, request
from counting_engine import CountingEngine, make_core
from counting_mixes import ids_of, run
from remote_drafting import AHEAD, KEPT, engine_of, new_executor
from serving import eventually, serving

from jaxinfer import draft_client
from jaxinfer.draft_client import DraftClient
from jaxinfer.executor import Executor
from jaxinfer.protos.v1 import draft_pb2 as pb
from jaxinfer.protos.v1 import draft_pb2_grpc as pb_grpc


@pytest.fixture(scope="module")
def executor() -> Executor:
    return new_executor()


class Patient(DraftClient):
    """Waits for the answer to all that it told: what comes over the network is then as certain as a call."""

    def __init__(self, *args):
        self.answered: dict[int, int] = {}
        super().__init__(*args)

    def _receive(self, response):
        super()._receive(response)
        self.answered[response.sequence] = response.position

    def take(self):
        eventually(lambda: all(self.answered.get(name) == len(row.tokens) for name, row in self._rows.items()))
        return super().take()


@contextmanager
def client(address: str, kind=DraftClient) -> Iterator[DraftClient]:
    found = kind(address, KEPT)
    try:
        yield found
    finally:
        found.close()
        assert not found._thread.is_alive()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


Answer = Callable[[pb.DraftRequest], Iterator[pb.DraftResponse]]


class Drafter(pb_grpc.DraftServiceServicer):
    """Answers each request as it is told."""

    def __init__(self, answer: Answer):
        self._answer = answer

    def Draft(self, requests, context):
        for one in requests:
            yield from self._answer(one)


@contextmanager
def drafting(answer: Answer, port: int = 0) -> Iterator[str]:
    """The address of a drafter of our own."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_DraftServiceServicer_to_server(Drafter(answer), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def right(one: pb.DraftRequest) -> Iterator[pb.DraftResponse]:
    if not one.ended:
        yield pb.DraftResponse(sequence=one.sequence, position=one.position + len(one.token_ids),
                               token_ids=range(one.token_ids[-1] + 1, one.token_ids[-1] + 1 + AHEAD))  # fmt: skip


def check_answers(executor: Executor, source: DraftClient, pause: float = 0.0):
    """Greedy, seeded and free requests get their own answers; the engine's metrics."""
    engine = engine_of(executor, source)
    requests = [request("greedy", range(9), 60, temperature=0.0), request("seeded", range(3), 50, given=5),
                request("free", range(30), 60)]  # fmt: skip
    for one in requests:
        engine.add(one)
    chunks = run(paced(engine, pause))
    assert [ids_of(chunks[one.id, 0]) for one in requests] == [counted(one) for one in requests]
    metrics = engine.metrics()
    assert metrics["failed_steps"] == 0
    return metrics


def paced(engine, pause):
    step = engine.step
    engine.step = lambda: time.sleep(pause) or step()
    return engine


def test_proposals_of_a_right_drafter_are_kept(executor):
    with drafting(right) as address, client(address, Patient) as source:
        metrics = check_answers(executor, source)
    assert metrics["accepted_tokens"] == metrics["draft_tokens"] > 40
    assert metrics["remote_proposals"]["malformed"] == 0


def test_the_service_drafts_for_the_engine(executor):
    """Both sides as they are. Its model counts in a larger vocabulary, which is the same for these ids."""
    core = make_core(CountingEngine(tokens_per_step=8, pace=0.001))
    with serving(core) as served:
        with client(served.server.address) as source:
            metrics = check_answers(executor, source, pause=0.02)
            eventually(lambda: not served.engine.rows)
        assert metrics["accepted_tokens"] > 20
        assert metrics["remote_proposals"]["malformed"] == metrics["remote_proposals"]["wrong"] == 0
        eventually(lambda: not served.server.drafts._exchanges)


def test_a_dead_address_costs_nothing(executor, caplog):
    with client(f"127.0.0.1:{free_port()}") as source:
        metrics = check_answers(executor, source, pause=0.02)
        eventually(lambda: caplog.records)
    assert metrics["draft_tokens"] == 0
    (record,) = caplog.records
    assert "UNAVAILABLE" in record.message and "decoding goes on without it" in record.message
    assert "\n" not in record.message, "one line"


def silence(one: pb.DraftRequest) -> Iterator[pb.DraftResponse]:
    yield from ()


def garbage(one: pb.DraftRequest) -> Iterator[pb.DraftResponse]:
    """Ids out of range, places out of range, sequences that are not told, nothing at all."""
    here, more = one.position + len(one.token_ids), [(one.token_ids or [0])[-1] + 1]
    yield pb.DraftResponse(sequence=one.sequence + 1000, position=here, token_ids=more)
    yield pb.DraftResponse(sequence=-1, position=here, token_ids=more)
    kinds = [(here, [-1]), (here, [*more, 256]), (-(2**31), more), (2**31 - 1, more), (here, []),
             (here - 1, [0, *more]), (0, [2**31 - 1] * 100)]  # fmt: skip
    position, ids = kinds[here % len(kinds)]
    yield pb.DraftResponse(sequence=one.sequence, position=position, token_ids=ids, probabilities=[float("nan"), -1.0])
    yield pb.DraftResponse()


def endless(one: pb.DraftRequest) -> Iterator[pb.DraftResponse]:
    """A message beyond every limit."""
    yield pb.DraftResponse(sequence=one.sequence, position=one.position + len(one.token_ids), token_ids=[1] * 100_000)


def refuse(one: pb.DraftRequest) -> Iterator[pb.DraftResponse]:
    raise ValueError("a broken drafter")


@pytest.mark.parametrize("answer", [silence, garbage, endless, refuse])
def test_a_bad_drafter_costs_speed_only(executor, answer, caplog):
    caplog.set_level(logging.CRITICAL, logger="grpc._server")
    with drafting(answer) as address, client(address) as source:
        metrics = check_answers(executor, source, pause=0.02)
        assert not source._arrived, "nothing is kept for rows that do not run"
    assert metrics["accepted_tokens"] == 0
    if answer is garbage:
        assert metrics["remote_proposals"]["malformed"] > 0


def test_a_drafter_that_breaks_off_again_and_again_is_of_some_use(executor, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL, logger="grpc._server")
    monkeypatch.setattr(draft_client, "FIRST_PAUSE", 0.01)
    told = []

    def breaking(one):
        told.append(one)
        if len(told) % 7 == 0:
            raise ValueError("breaks off")
        yield from right(one)

    with drafting(breaking) as address, client(address) as source:
        metrics = check_answers(executor, source, pause=0.02)
    assert len([one for one in told if one.position == 0]) > 3, "rows are told again"
    assert metrics["accepted_tokens"] == metrics["draft_tokens"] > 0


def test_a_drafter_that_dies_is_told_everything_when_it_is_back(executor, monkeypatch, caplog):
    monkeypatch.setattr(draft_client, "LONGEST_PAUSE", 0.1)
    port, told = free_port(), []

    def remember(one):
        told.append(one)
        yield from right(one)

    def has_proposed():  # for row 1: row 2 is told beside it, and its answer may come at any time
        return any(proposal.name == 1 for proposal in source.take())

    with client(f"127.0.0.1:{port}") as source:
        source.tell(1, 0, [1, 2, 3])
        for tokens in ([4], [5, 6]):
            with drafting(remember, port):
                eventually(has_proposed, timeout=10)
                source.tell(1, len(source._rows[1].tokens), tokens)
                eventually(has_proposed)
            source.forget(2)
            source.tell(2, 0, [9])
    first = [list(one.token_ids) for one in told if one.sequence == 1 and one.position == 0]
    assert first == [[1, 2, 3], [1, 2, 3, 4]]
    assert [list(one.token_ids) for one in told if one.position] == [[4], [5, 6]]
    assert any(record.message.endswith("answers again") for record in caplog.records)


def test_long_rows_are_told_in_pieces(monkeypatch):
    monkeypatch.setattr(draft_client, "MOST_TOLD", 4)
    told = []

    def remember(one):
        told.append((one.position, len(one.token_ids), one.ended))
        yield from right(one)

    with drafting(remember) as address, client(address) as source:
        source.tell(1, 0, range(10))
        eventually(lambda: len(told) == 3)
        source.forget(1)
        eventually(lambda: len(told) == 4)
    assert told == [(0, 4, False), (4, 4, False), (8, 2, False), (0, 0, True)]


def test_a_drafter_that_reads_nothing_holds_nobody_up():
    """Tokens of a row that waits to be sent are kept once, and rows that end meanwhile leave nothing."""
    stop = threading.Event()

    class Deaf(pb_grpc.DraftServiceServicer):
        def Draft(self, requests, context):
            stop.wait(10)
            yield from ()

    server = grpc.server(ThreadPoolExecutor(1))
    pb_grpc.add_DraftServiceServicer_to_server(Deaf(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with client(f"127.0.0.1:{port}") as source:
        for name in range(200):
            source.tell(name, 0, range(50_000))
            if name > 3:
                source.forget(name)
        assert len(source._rows) == 4
        assert len(source._to_send) <= 200
    stop.set()
    server.stop(0).wait()
