"""Servers in processes of their own: their CPU time is theirs alone, and the client's is not in it.

"counting" is the real server over an engine that counts, "paced" over the real engine and a device that takes its
time, "bare" is a grpc.aio server that does nothing but send messages recorded from "counting", on asyncio's event
loop, and "bare on our loop" the same on the one that we serve on.
"""

import argparse
import asyncio
import json
import multiprocessing
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from benchmarks.serving.bare import BareServer
from benchmarks.serving.counting import MAX_MODEL_LEN, VOCAB_SIZE, CountingEngine, ReadyTimes
from benchmarks.serving.paced import PacedDevice, paced_engine
from jaxinfer.core import Core, EngineHandle, ModelInfo
from jaxinfer.intake import Intake
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.validation import Limits
from serve.event_loop import new_event_loop
from serve.server import Server, ServerConfig, settle_heap

Answers = Mapping[str, Callable[..., Any]]
"""Questions that a server's process answers."""


@dataclass(frozen=True, slots=True)
class Started:
    """server: held, because one that nobody holds stops."""

    port: int
    answers: Answers
    server: Any


class ServerProcess:
    """A server in a child process, and questions to it."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self.address = f"127.0.0.1:{connection.recv()}"

    def cpu_seconds(self) -> float:
        """User and system time of the whole process so far."""
        return self.ask("cpu")

    def ready_times(self) -> ReadyTimes:
        """Since they were last asked for."""
        return self.ask("ready")

    def ask(self, question: str, *arguments: Any) -> Any:
        self._connection.send((question, arguments))
        return self._connection.recv()


@contextmanager
def server_process(kind: str, *arguments: Any) -> Iterator[ServerProcess]:
    """Starts a server of one of the kinds above; stops it at the end. arguments: of `paced_engine`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(kind, arguments, there), daemon=True)
    process.start()
    try:
        yield ServerProcess(here)
    finally:
        process.terminate()
        process.join()


def _main(kind: str, arguments: tuple[Any, ...], connection: Connection) -> None:
    start, loop_factory = {
        "counting": (_counting, new_event_loop), "paced": (_paced, new_event_loop),
        "bare": (_bare, asyncio.new_event_loop), "bare on our loop": (_bare, new_event_loop)}[kind]
    asyncio.run(_run(start(*arguments), connection), loop_factory=loop_factory)


async def _run(starting: Awaitable[Started], connection: Connection) -> None:
    started = await starting
    settle_heap()  # as `jaxinfer serve` does; the bare server gets it too
    connection.send(started.port)
    await asyncio.to_thread(_answer, connection, {"cpu": time.process_time, **started.answers})


async def _counting() -> Started:
    engine = CountingEngine()
    return await _serve(engine, {
        "ready": lambda: _taken(engine), "engine": engine.cpu_seconds,
        "tokens_per_step": lambda count: setattr(engine, "tokens_per_step", count)})


async def _bare() -> Started:
    server = BareServer()
    return Started(await server.start(), {"ready": lambda: _taken(server), "load": server.load}, server)


async def _paced(max_waiting: int) -> Started:
    device = PacedDevice()
    engine = paced_engine(device, max_waiting)
    return await _serve(engine, {"steps": device.take_steps, "lateness": device.take_lateness, "load": engine.load})


async def _serve(engine: EngineHandle, answers: Answers) -> Started:
    """The real server over `engine`."""
    tokenizer = bpe_tokenizer()
    intake = Intake(tokenizer, Limits(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN))
    info = ModelInfo("counting", "counting", VOCAB_SIZE, MAX_MODEL_LEN, "int32", 0, (), True, False)
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.ready(Core(info, intake, tokenizer, engine))
    return Started(server.port, answers, server)


def _taken(times: CountingEngine | BareServer) -> ReadyTimes:
    times.ready, ready = {}, times.ready
    return ready


def _answer(connection: Connection, answers: Answers) -> None:
    while True:
        question, arguments = connection.recv()
        connection.send(answers[question](*arguments))


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
