"""Requests as many users send them: each at its time, whether those before have been answered or not."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from benchmarks.serving.wire import Service
from benchmarks.workloads import log_uniform, random_prompt

PROMPTS, OUTPUTS = (64, 1024), (16, 256)
"""Tokens, log-uniform."""

Call = grpc.aio.UnaryStreamMultiCallable


@dataclass(slots=True)
class Answer:
    """What came of one request; times in time.monotonic() seconds. arrived: raw messages and when each came.

    code: the name of the status that it ended with.
    """

    sent: float
    arrived: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    code: str = "OK"

    @property
    def first_token(self) -> float:
        """Seconds until the first message, which has the first token."""
        return self.arrived[0][0] - self.sent if self.arrived else float("inf")

    def token_times(self, service: Service) -> list[tuple[float, int]]:
        """When messages with tokens came, and how many tokens they had."""
        counted = ((moment, service.count(raw)) for moment, raw in self.arrived)
        return [(moment, count) for moment, count in counted if count]


def load(service: Service, count: int, name: str, rng: random.Random) -> list[bytes]:
    """Requests of token ids; no two prompts begin alike."""
    prompts, outputs = log_uniform(count, rng, *PROMPTS), log_uniform(count, rng, *OUTPUTS)
    return [service.make_request(f"{name}-{number}", random_prompt(prompt, rng), output)
            for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))]


@asynccontextmanager
async def calling(address: str, service: Service) -> AsyncIterator[Call]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel.unary_stream(service.method)


async def ask(call: Call, request: bytes) -> Answer:
    """One request. What arrives is kept unread: the client must not compete for the CPU."""
    answer = Answer(time.monotonic())
    try:
        async for raw in call(request):
            answer.arrived.append((time.monotonic(), raw))
    except grpc.aio.AioRpcError as error:
        answer.code = error.code().name
    answer.ended = time.monotonic()
    return answer


def poisson(rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """Moments in [0, seconds) of `rate` arrivals a second on average, each independent of the others."""
    moment = rng.expovariate(rate)
    while moment < seconds:
        yield moment
        moment += rng.expovariate(rate)


async def open_loop(call: Call, requests: Iterable[bytes], moments: Iterable[float]) -> list[Answer]:
    """Sends each request at its moment (seconds from now) and waits for all answers."""
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Answer]] = []
        for request, moment in zip(requests, moments, strict=False):
            await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
            tasks.append(group.create_task(ask(call, request)))
    return [task.result() for task in tasks]


async def closed_loop(call: Call, requests: Iterable[bytes], num_users: int, seconds: float) -> list[Answer]:
    """`num_users` send one request after the other for so long; what runs then is waited for."""
    end, queue, answers = time.monotonic() + seconds, iter(requests), []

    async def user() -> None:
        for request in queue:
            if time.monotonic() > end:
                return
            answers.append(await ask(call, request))

    await asyncio.gather(*(user() for _ in range(num_users)))
    return answers
