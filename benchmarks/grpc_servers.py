"""The two servers that bench_grpc compares, each in a process of its own.

Ours: the real service, bridge, assembler and codec over an engine that counts, at a fixed pace. Bare: a grpc.aio server
that does nothing but send messages recorded from ours, at the same pace. Both note when each message became ready.
"""

import argparse
import asyncio
import json
import multiprocessing
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import grpc
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxinfer.core import Consumer, Core, Load, ModelInfo
from jaxinfer.intake import Intake
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import Request, RequestStats, TokenChunk
from jaxinfer.validation import Limits
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc
from serve.server import Server, ServerConfig, settle_heap

VOCAB_SIZE = 4096
MAX_MODEL_LEN = 4096
TOKENS_PER_STEP = 8
"""As many as the engine decodes in one device call while nobody waits."""
PACE_SECONDS = 0.02

COUNTING = [*range(VOCAB_SIZE), *range(MAX_MODEL_LEN)]
"""What comes after an id, however far a request may go."""

ReadyTimes = dict[str, list[float]]
"""Request id to the time (time.monotonic) at which each of its messages became ready."""


@dataclass(slots=True)
class _Row:
    request: Request
    consumer: Consumer
    chunks: Iterator[TokenChunk]
    stats: RequestStats
    ready: list[float] = field(default_factory=list)


class CountingEngine:
    """An EngineHandle whose next token is (last + 1) mod V. It must cost little, since it is not what is
    measured: all chunks of a request are made when it comes, and nothing runs while no request does."""

    def __init__(self):
        self.ready: ReadyTimes = {}
        self._rows: dict[str, _Row] = {}
        self._wake = threading.Condition()
        self._closed = False
        self.alive = True
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Request, consumer: Consumer) -> None:
        stats = RequestStats(arrival=request.arrival, num_prompt_tokens=len(request.prompt))
        row = _Row(request, consumer, iter(chunks_of(request, stats)), stats)
        self.ready[request.id.rpartition("/")[0]] = row.ready
        with self._wake:
            self._rows[request.id] = row
            self._wake.notify()

    def cancel(self, request_id: str, index: int | None = None) -> None:
        with self._wake:
            self._rows.pop(request_id, None)

    def progress(self) -> int | None:
        return None

    def load(self) -> Load:
        return Load(len(self._rows), 0, 0, 0, 0, 1)

    def metrics(self) -> dict[str, Any]:
        return {}

    def run(self, work: Callable[[Any], Any]) -> Any:
        return work(self)

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            if not self._rows:
                with self._wake:
                    self._wake.wait_for(lambda: self._rows or self._closed)
            if self._closed:
                return
            now = time.monotonic()
            due = max(due + PACE_SECONDS, now)
            time.sleep(due - now)
            self._step(list(self._rows.values()))

    def _step(self, rows: list[_Row]) -> None:
        if not rows:
            return
        now = time.monotonic()
        chunks: list[TokenChunk] = []
        for row in rows:
            chunk = next(row.chunks)
            chunks.append(chunk)
            row.ready.append(now)
            if chunk.finish_reason is not None:
                row.stats.scheduled, row.stats.first_token, row.stats.finished = row.ready[0], row.ready[0], now
                self._rows.pop(row.request.id, None)
        rows[0].consumer.deliver(chunks)  # the service is one consumer


def chunks_of(request: Request, stats: RequestStats) -> list[TokenChunk]:
    """All that the engine will say of a request."""
    first = request.prompt[-1] + 1
    starts = range(first, first + request.max_tokens, TOKENS_PER_STEP)
    chunks = [TokenChunk(request.id, 0, COUNTING[start:start + TOKENS_PER_STEP]) for start in starts]
    chunks[-1].finish_reason, chunks[-1].stats = "length", stats
    return chunks


class BareService(pb_grpc.GenerationServiceServicer):
    """Sends each request the messages recorded for it, one a beat."""

    def __init__(self):
        self.ready: ReadyTimes = {}
        self.messages: dict[str, list[pb.GenerateStreamResponse]] = {}
        self._waiting: list[asyncio.Future[float]] = []
        self._beating = False

    async def GenerateStream(self, request: pb.GenerateRequest,
                             context: grpc.aio.ServicerContext) -> AsyncIterator[pb.GenerateStreamResponse]:
        ready = self.ready[request.request_id] = []
        for message in self.messages[request.request_id]:
            ready.append(await self._beat())
            yield message

    def _beat(self) -> "asyncio.Future[float]":
        loop = asyncio.get_running_loop()
        if not self._beating:
            self._beating = True
            loop.call_later(PACE_SECONDS, self._strike, loop, loop.time() + PACE_SECONDS)
        future = loop.create_future()
        self._waiting.append(future)
        return future

    def _strike(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        waiting, self._waiting = self._waiting, []
        self._beating = bool(waiting)
        if waiting:
            due = max(due + PACE_SECONDS, loop.time())
            loop.call_at(due, self._strike, loop, due)
        now = time.monotonic()
        for future in waiting:
            if not future.done():
                future.set_result(now)


class ServerProcess:
    """A server in a child process, and questions to it."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self.address = f"127.0.0.1:{connection.recv()}"

    def cpu_seconds(self) -> float:
        """User and system time of the whole process so far."""
        return self._ask("cpu")

    def ready_times(self) -> ReadyTimes:
        return self._ask("ready")

    def load(self, messages: dict[str, list[bytes]]) -> None:
        """Gives the bare server what it is to send."""
        self._ask(messages)

    def _ask(self, question: Any) -> Any:
        self._connection.send(question)
        return self._connection.recv()


@contextmanager
def server_process(kind: str) -> Iterator[ServerProcess]:
    """Starts "ours" or "bare"; stops it at the end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(kind, there), daemon=True)
    process.start()
    try:
        yield ServerProcess(here)
    finally:
        process.terminate()
        process.join()


def _main(kind: str, connection: Connection) -> None:
    asyncio.run(_ours(connection) if kind == "ours" else _bare(connection))


async def _ours(connection: Connection) -> None:
    tokenizer, engine = bpe_tokenizer(), CountingEngine()
    intake = Intake(tokenizer, Limits(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN))
    info = ModelInfo("counting", "counting", VOCAB_SIZE, MAX_MODEL_LEN, "int32", 0, (), True, False)
    server = Server(ServerConfig(port=0))
    await server.start()
    settle_heap()
    await server.ready(Core(info, intake, tokenizer, engine))
    connection.send(server.port)
    await asyncio.to_thread(_answer, connection, engine, None)


async def _bare(connection: Connection) -> None:
    server, service = grpc.aio.server(), BareService()
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    connection.send(port)
    await asyncio.to_thread(_answer, connection, service, service)


def _answer(connection: Connection, times: CountingEngine | BareService, bare: BareService | None) -> None:
    while True:
        question = connection.recv()
        if question == "cpu":
            connection.send(time.process_time())
        elif question == "ready":
            times.ready, ready = {}, times.ready
            connection.send(ready)
        elif bare is not None:
            parse = pb.GenerateStreamResponse.FromString
            bare.messages = {id: [parse(raw) for raw in raws] for id, raws in question.items()}
            connection.send(None)


def bpe_tokenizer() -> Tokenizer:
    """A byte-level BPE trained on a few modules of the standard library."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    modules = (argparse, asyncio.base_events, threading, json.decoder)
    backend.train([module.__file__ for module in modules if module.__file__], trainer)
    return Tokenizer.from_json(backend.to_str())
