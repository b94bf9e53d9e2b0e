"""The engine's thread: thread-safe submit and cancel, bounded queue, draining, and what a failure does to whom."""

import queue
import threading

import pytest
from counting import counted, new_engine, new_executor, request, small_config

from jaxinfer.engine_thread import EngineThread
from jaxinfer.errors import EngineClosed, InvalidRequest, Overloaded, StepFailed

TIMEOUT = 30.0


class Inbox:
    """Keeps what it is given; can be told to fail."""

    def __init__(self, failing: bool = False):
        self.chunks: queue.SimpleQueue = queue.SimpleQueue()
        self.failing = failing

    def deliver(self, chunks):
        if self.failing:
            raise RuntimeError("consumer is broken")
        for chunk in chunks:
            self.chunks.put(chunk)

    def until_end(self):
        """All chunks up to the first that ends a sample."""
        found = []
        while not found or found[-1].finish_reason is None:
            found.append(self.chunks.get(timeout=TIMEOUT))
        return found


@pytest.fixture(scope="module")
def executor():
    return new_executor(small_config())


@pytest.fixture
def engine(executor):
    return new_engine(executor)


@pytest.fixture
def thread(engine):
    thread = EngineThread(engine, max_waiting=6)
    yield thread
    thread.close()


def ids_of(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


def test_requests_from_many_threads_get_their_own_answers(thread):
    requests = [request(str(index), [index * 9], 20) for index in range(6)]
    inboxes = [Inbox() for _ in requests]
    senders = [threading.Thread(target=thread.submit, args=pair) for pair in zip(requests, inboxes, strict=True)]
    for sender in senders:
        sender.start()
    for one, inbox in zip(requests, inboxes, strict=True):
        assert ids_of(inbox.until_end()) == counted(one)


def test_one_delivery_a_step_and_consumer(engine):
    deliveries = []
    thread = EngineThread(engine, max_waiting=8)
    done = threading.Event()

    class Counter:
        def deliver(self, chunks):
            deliveries.append(chunks)
            if sum(chunk.finish_reason is not None for parcel in deliveries for chunk in parcel) == 4:
                done.set()

    consumer = Counter()
    gate = hold(thread)
    for index in range(4):
        thread.submit(request(str(index), [index], 9), consumer)
    gate.set()
    assert done.wait(TIMEOUT)
    thread.close()
    assert all(len(parcel) == 4 for parcel in deliveries), "rows that run together are delivered together"


def hold(thread):
    """Occupies the engine's thread until the returned event is set."""
    gate = threading.Event()
    threading.Thread(target=thread.run, args=(lambda engine: gate.wait(TIMEOUT),), daemon=True).start()
    return gate


def test_a_full_queue_refuses_and_says_the_limit(thread):
    gate, inbox = hold(thread), Inbox()
    for index in range(6):
        thread.submit(request(str(index), [index], 2), inbox)
    with pytest.raises(Overloaded, match="the limit is 6"):
        thread.submit(request("late", [1], 2), inbox)
    gate.set()
    for _ in range(6):
        inbox.until_end()
    thread.submit(request("again", [1], 2), inbox)
    assert ids_of(inbox.until_end()) == [2, 3]


def test_cancel_frees_pages_and_ends_the_stream(thread):
    inbox = Inbox()
    thread.submit(request("long", [1], 90), inbox)
    inbox.chunks.get(timeout=TIMEOUT)
    thread.cancel("long")
    thread.cancel("never seen")
    assert thread.run(lambda engine: engine.scheduler.pool.num_held) == 0
    thread.run(lambda engine: engine.scheduler.check_invariants())


def test_without_a_leak_none_is_counted(thread):
    thread.submit(request("good", [1], 2), inbox := Inbox())
    inbox.until_end()
    thread.close()
    assert thread.metrics()["idle_leaks"] == 0


def test_a_leak_is_counted_and_logged_once_nothing_runs(thread, caplog):
    thread.run(lambda engine: engine.scheduler.pool.allocate(2))
    thread.submit(request("good", [1], 2), inbox := Inbox())
    inbox.until_end()
    thread.close()
    assert thread.metrics()["idle_leaks"] > 0
    assert "2 held pages" in caplog.text


def test_cancelling_one_sample_leaves_the_others(thread):
    inbox = Inbox()
    one = request("both", [1], 60, n=2)
    gate = hold(thread)
    thread.submit(one, inbox)
    thread.cancel("both", 0)
    gate.set()
    chunks = inbox.until_end()
    assert {chunk.index for chunk in chunks} == {1}
    assert ids_of(chunks) == counted(one)


def test_a_broken_consumer_loses_its_own_requests_only(thread):
    healthy = Inbox()
    one = request("healthy", [7], 40)
    thread.submit(request("broken", [1], 40), Inbox(failing=True))
    thread.submit(one, healthy)
    assert ids_of(healthy.until_end()) == counted(one)
    assert thread.run(lambda engine: engine.scheduler.pool.num_held) == 0


def test_close_drains_running_requests(engine):
    thread, inbox = EngineThread(engine, max_waiting=4), Inbox()
    one = request("running", [3], 50)
    thread.submit(one, inbox)
    inbox_first = inbox.chunks.get(timeout=TIMEOUT)
    thread.close(drain_seconds=TIMEOUT)
    assert inbox_first.token_ids + ids_of(inbox.until_end()) == counted(one)
    with pytest.raises(EngineClosed, match="takes no more requests; start a new one"):
        thread.submit(request("late", [1], 2), inbox)
    with pytest.raises(EngineClosed, match="has stopped; start a new one"):
        thread.run(lambda engine: None)


def test_close_without_grace_aborts_what_runs(engine):
    thread, inbox = EngineThread(engine, max_waiting=4), Inbox()
    gate = hold(thread)
    thread.submit(request("running", [3], 50), inbox)
    closer = threading.Thread(target=thread.close)
    closer.start()
    gate.set()
    closer.join(TIMEOUT)
    last = inbox.until_end()[-1]
    assert last.finish_reason == "abort"
    assert isinstance(last.error, EngineClosed)
    assert not thread.alive


def test_repeated_step_failures_reach_every_client(engine):
    class Failing:
        dispatch = staticmethod(lambda plan: (_ for _ in ()).throw(RuntimeError("injected")))
        reset = staticmethod(lambda: None)

    engine.runner = Failing()
    thread, inbox = EngineThread(engine, max_waiting=4), Inbox()
    thread.submit(request("a", [1], 3), inbox)
    last = inbox.until_end()[-1]
    assert last.finish_reason == "error"
    assert isinstance(last.error, StepFailed)
    thread.close()
    with pytest.raises(EngineClosed):
        thread.submit(request("b", [1], 3), inbox)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(thread):
    first, second = Inbox(), Inbox()
    one = request("same", [3], 60)
    gate = hold(thread)
    thread.submit(one, first)
    thread.submit(request("same", [9], 5), second)
    gate.set()
    refused = second.until_end()[-1]
    assert isinstance(refused.error, InvalidRequest)
    assert "same" in str(refused.error)
    assert ids_of(first.until_end()) == counted(one)


def test_a_request_that_cannot_be_added_ends_alone_and_waits_no_more(engine, monkeypatch):
    add = engine.add

    def defective(one):
        if one.id == "bad":
            raise KeyError("a defect")
        add(one)

    monkeypatch.setattr(engine, "add", defective)
    thread = EngineThread(engine, max_waiting=6, max_waiting_tokens=5)
    bad, good = Inbox(), Inbox()
    try:
        thread.submit(request("bad", [1, 2, 3], 4), bad)
        assert isinstance(bad.until_end()[-1].error, KeyError)
        gate = hold(thread)
        for name in ("first", "second"):  # four tokens of five: those of the other are not counted any more
            thread.submit(request(name, [3, 4], 5), good)
        gate.set()
        assert {good.until_end()[-1].request_id for _ in range(2)} == {"first", "second"}
    finally:
        thread.close()


def test_errors_of_posted_work_reach_the_caller(thread):
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda engine: 1 // 0)
    assert thread.alive
