"""The thread that owns an engine, and the thread-safe way to it."""

import atexit
import contextlib
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jaxinfer.core import Consumer, Load
from jaxinfer.engine import Engine
from jaxinfer.errors import EngineClosed, InvalidRequest, JaxInferError, Overloaded, StepFailed
from jaxinfer.fault_points import fault_point
from jaxinfer.types import Request, TokenChunk

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Reader:
    """Who gets a request's chunks, and which of its samples still run. waiting: prompt tokens, until its first chunk.
    """

    consumer: Consumer
    running: set[int]
    waiting: int


class EngineThread:
    """Feeds the engine from a locked inbox and hands every step's chunks to their consumers."""

    def __init__(self, engine: Engine, max_waiting: int, max_waiting_tokens: int = sys.maxsize):
        """max_waiting: samples that may queue. max_waiting_tokens: prompt tokens of those that have no token yet; what
        has more alone may wait alone.
        """
        self._engine = engine
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._tokens_in = 0  # prompt tokens so far; written by those who submit, under the lock
        self._tokens_out = 0  # of them, those that wait no more; written by the engine's thread alone
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._num_submitted = 0
        self._accepting = True
        self._stopping = False
        self._idle = True
        self._has_died = False  # the thread may live on for as long as the device takes to end its step
        self._readers: dict[str, _Reader] = {}
        self._thread = threading.Thread(target=self._main, name="jaxinfer-engine", daemon=True)
        # XLA aborts the process when the interpreter goes down around a thread that is inside it.
        atexit.register(self.close)
        self._thread.start()

    def submit(self, request: Request, consumer: Consumer) -> None:
        """Queue a request. Raises Overloaded or EngineClosed."""
        tokens = num_prompt_tokens(request)
        with self._wake:
            self._check_room(request.params.n)
            self._check_tokens(tokens)
            self._num_submitted += request.params.n
            self._tokens_in += tokens
            self._post(lambda: self._admit(request, consumer))

    def check_room(self, num_samples: int) -> None:
        """Raises what `submit` would raise for a request of so many samples, however short: the work of making one need
        not be done then.
        """
        with self._wake:
            self._check_room(num_samples)

    def _check_room(self, num_samples: int) -> None:
        if not self._accepting:
            raise EngineClosed("the engine is stopping or has stopped and takes no more requests; start a new one")
        if num_samples > self._max_waiting:
            raise InvalidRequest("n", f"{num_samples} samples are more than may ever wait (max_waiting "
                                 f"{self._max_waiting}); lower n")
        waiting = self._engine.scheduler.num_waiting + self._num_submitted
        if waiting + num_samples > self._max_waiting:
            raise Overloaded(f"{waiting} requests are waiting, the limit is {self._max_waiting}; "
                             "try again later or raise max_waiting")

    def _check_tokens(self, tokens: int) -> None:
        waiting = self._tokens_in - self._tokens_out
        if waiting and waiting + tokens > self._max_waiting_tokens:
            raise Overloaded(f"{waiting} prompt tokens are waiting, with the {tokens} of this request more than the "
                             f"limit, {self._max_waiting_tokens}; try again later or raise max_waiting_tokens")

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or the one sample in whose text a stop string came, within one step. Unknown ids are ignored;
        no chunk follows.
        """
        with self._wake:
            self._post(lambda: self._drop(request_id, index))

    def run(self, work: Callable[[Engine], Any]) -> Any:
        """`work(engine)`, called on the engine's thread between steps with nothing in flight; its result."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("run() would wait for the thread it was called on")
        future: Future[Any] = Future()
        with self._wake:
            if self._stopping:
                raise EngineClosed("the engine has stopped; start a new one")
            self._post(lambda: self._call(work, future))
        return future.result()

    def progress(self) -> int | None:
        """See `core.EngineHandle`. A drafter elsewhere, consumers and messages must not hold the engine up either."""
        return None if self._idle else self._engine.num_steps

    def load(self) -> Load:
        return self._engine.scheduler.load()

    def metrics(self) -> dict[str, Any]:
        return self._engine.metrics()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._has_died

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for `drain_seconds`, then stop; the rest end with "abort"."""
        with self._wake:
            self._accepting = False
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._idle and not self._inbox, timeout=drain_seconds)
            self._stopping = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _post(self, message: Callable[[], None]) -> None:
        self._inbox.append(message)
        self._wake.notify_all()

    def _main(self) -> None:
        failure: Exception = EngineClosed("the engine was closed before the request ended")
        self._engine.watch_compiles()
        try:
            while self._next_messages():
                fault_point("loop")
                self._deliver(self._engine.step())
        except StepFailed as error:
            failure = error
        except BaseException:
            log.exception("the engine thread died")
            failure = EngineClosed("the engine died; the log has the reason")
        finally:
            self._end_all(failure)
            with contextlib.suppress(Exception):
                self._engine.drain()  # the device is left idle: XLA aborts a process that ends around its work
            self._engine.close()

    def _next_messages(self) -> bool:
        """Waits for work and takes in what was posted; False when it is time to stop."""
        with self._wake:
            self._idle = not self._engine.has_work
            if self._idle:
                self._engine.check_rest()
                self._wake.notify_all()
            self._wake.wait_for(lambda: self._inbox or self._stopping or self._engine.has_work)
            messages, self._inbox = self._inbox, []
            self._idle = False
        self._take_in(messages)
        return not self._stopping

    def _admit(self, request: Request, consumer: Consumer) -> None:
        with self._wake:
            self._num_submitted -= request.params.n
        try:
            fault_point("admit", request.id)
            self._engine.add(request)
        except BaseException as error:  # its own fault, as an id of another one that runs; or a defect
            if not isinstance(error, JaxInferError):
                log.exception("a request could not be added; it ends alone")
            self._tokens_out += num_prompt_tokens(request)
            self._refuse(request, consumer, error)
        else:
            self._readers[request.id] = _Reader(
                consumer, set(range(request.params.n)), num_prompt_tokens(request))

    @staticmethod
    def _refuse(request: Request, consumer: Consumer, error: BaseException) -> None:
        try:
            consumer.deliver([TokenChunk(request.id, index, [], finish_reason="error", error=error)
                              for index in range(request.params.n)])
        except BaseException:
            log.exception("a consumer failed; its request was refused anyway")

    def _drop(self, request_id: str, index: int | None) -> None:
        self._engine.cancel(request_id, index)
        reader = self._readers.get(request_id)
        if reader is not None:
            reader.running -= reader.running if index is None else {index}
            self._forget_if_done(request_id, reader)

    def _forget_if_done(self, request_id: str, reader: _Reader) -> None:
        if not reader.running:
            self._stop_waiting(reader)
            self._readers.pop(request_id, None)

    def _stop_waiting(self, reader: _Reader) -> None:
        self._tokens_out += reader.waiting
        reader.waiting = 0

    def _call(self, work: Callable[[Engine], Any], future: "Future[Any]") -> None:
        try:
            self._deliver(self._engine.drain())
            future.set_result(work(self._engine))
        except BaseException as error:  # a Rust panic, too, is the caller's; nobody else waits for it
            future.set_exception(error)

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        """One call a consumer and step, chunks in order."""
        parcels: dict[int, tuple[Consumer, list[TokenChunk]]] = {}
        for chunk in chunks:
            reader = self._readers.get(chunk.request_id)
            if reader is None:
                continue
            if reader.waiting:
                self._stop_waiting(reader)
            parcels.setdefault(id(reader.consumer), (reader.consumer, []))[1].append(chunk)
            if chunk.finish_reason is not None:
                reader.running.discard(chunk.index)
                self._forget_if_done(chunk.request_id, reader)
        for consumer, parcel in parcels.values():
            self._hand_over(consumer, parcel)

    def _hand_over(self, consumer: Consumer, parcel: list[TokenChunk]) -> None:
        try:
            consumer.deliver(parcel)
        except BaseException:
            log.exception("a consumer failed; its requests are dropped")
            for request_id in {chunk.request_id for chunk in parcel}:
                self._drop(request_id, None)

    def _end_all(self, failure: Exception) -> None:
        with self._wake:
            self._accepting = False
            self._stopping = self._has_died = True
            messages, self._inbox = self._inbox, []
            self._idle = True
            self._wake.notify_all()
        self._take_in(messages)
        reason = "abort" if isinstance(failure, EngineClosed) else "error"
        for request_id, reader in list(self._readers.items()):
            self._hand_over(reader.consumer, [TokenChunk(request_id, index, [], finish_reason=reason, error=failure)
                                              for index in sorted(reader.running)])

    @staticmethod
    def _take_in(messages: list[Callable[[], None]]) -> None:
        """What one of them raises must not end the engine, nor keep the others from being heard."""
        for message in messages:
            try:
                message()
            except BaseException:
                log.exception("a message to the engine failed")


def num_prompt_tokens(request: Request) -> int:
    """Of all its samples: each keeps its own."""
    return len(request.prompt) * request.params.n
