"""What the service costs on top of gRPC: CPU of the server's process a streamed token, over that of a bare server.

The bare grpc.aio server sends the same messages, byte for byte, at the same pace, on asyncio's event loop, as grpc.aio
runs where nobody chooses; a second one does so on the event loop that we serve on. All run beside each other in
processes of their own and are measured in turns, in several rounds; the client is this process. Everything of ours is
in the figure, nothing is subtracted: the counting engine (which is also shown alone), the hand-over to the loop,
detokenising, the messages, and each request's intake.
"""

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import grpc

from benchmarks.report import Result
from benchmarks.serving.counting import ReadyTimes
from benchmarks.serving.processes import ServerProcess, server_process
from benchmarks.serving.wire import SERVICES, Service
from benchmarks.workloads import median_ratio

NUM_MESSAGES = {1: 128, 16: 64, 64: 64}
"""Streams to messages with tokens that each of them gets."""
QUICK_NUM_MESSAGES = 8
TOKENS_PER_MESSAGE = (8, 1)
"""As the engine decodes in one device call while nobody waits, and while somebody does."""
FLOOR, GOAL = 2.0, 1.3
OURS = "ours"
BARE = ("bare", "bare on our loop")
KINDS = {OURS: "counting"} | {name: name for name in BARE}
"""Of each server that is measured, its kind (`processes`)."""

Received = dict[str, list[tuple[float, bytes]]]
"""Request id to its messages and when each arrived."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the comparison."""

    service: Service
    num_streams: int
    tokens_per_message: int
    num_messages: int

    @property
    def name(self) -> str:
        streams = f"{self.num_streams} stream{'s' if self.num_streams > 1 else ''}"
        return f"{self.service.name}, {streams}, {self.tokens_per_message} a message"

    @property
    def max_tokens(self) -> int:
        """Of each stream, in whole messages."""
        return self.num_messages * self.tokens_per_message


@dataclass(slots=True)
class Costs:
    """Of one server in one case, over all rounds: CPU microseconds a token, of the process and of the counting engine's
    thread in it; latencies in seconds.
    """

    cpu: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)

    def latency_p99(self) -> float:
        return statistics.quantiles(self.latency, n=100)[98]


def cases(*, quick: bool = False) -> list[Case]:
    return [Case(service, num_streams, tokens, QUICK_NUM_MESSAGES if quick else num_messages)
            for service in SERVICES.values() for tokens in TOKENS_PER_MESSAGE
            for num_streams, num_messages in NUM_MESSAGES.items()]


def requests(case: Case, rng: random.Random) -> dict[str, bytes]:
    """By id, with text prompts as users send them."""
    return {id: case.service.make_request(id, f"def function_{rng.randrange(10**6)}(", case.max_tokens)
            for id in (f"{case.num_streams}-{number}" for number in range(case.num_streams))}


async def stream_all(address: str, method: str, messages: dict[str, bytes]) -> Received:
    """Runs all requests at once and keeps what arrives, unread: the client must not compete for the CPU."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(method)

        async def one(message: bytes) -> list[tuple[float, bytes]]:
            return [(time.monotonic(), raw) async for raw in call(message)]

        found = await asyncio.gather(*map(one, messages.values()))
    return dict(zip(messages, found, strict=True))


def measure(server: ServerProcess, case: Case, messages: dict[str, bytes], costs: Costs) -> Received:
    """One round of one server."""
    server.ready_times()
    before = server.cpu_seconds()
    received = asyncio.run(stream_all(server.address, case.service.method, messages))
    seconds = server.cpu_seconds() - before
    costs.cpu.append(seconds / (case.num_streams * case.max_tokens) * 1e6)
    return received


def latencies(service: Service, ready: ReadyTimes, received: Received) -> Iterator[float]:
    """Of every message of ours, from when its last tokens were ready to its arrival. A late one may carry several
    steps' tokens.
    """
    for request_id, arrived in received.items():
        times, counts = ready[request_id], [service.count(raw) for _, raw in arrived]
        num_tokens, total = 0, sum(counts)
        for (arrival, _), count in zip(arrived, counts, strict=True):
            num_tokens += count
            yield arrival - times[-(-num_tokens * len(times) // total) - 1]


def compare(servers: dict[str, ServerProcess], case: Case, costs: dict[str, Costs], seed: int) -> None:
    """One round: ours, then the bare servers with the very messages that ours sent."""
    messages = requests(case, random.Random(seed))
    ours = servers[OURS]
    ours.ask("tokens_per_step", case.tokens_per_message)
    before = ours.ask("engine")
    received = measure(ours, case, messages, costs[OURS])
    costs[OURS].engine.append((ours.ask("engine") - before) / (case.num_streams * case.max_tokens) * 1e6)
    costs[OURS].latency += latencies(case.service, ours.ready_times(), received)
    for name in BARE:
        echo(servers[name], case, messages, received, costs[name])


def echo(bare: ServerProcess, case: Case, messages: dict[str, bytes], recorded: Received, costs: Costs) -> None:
    """One round of a bare server."""
    bare.ask("load", case.service.name, bodies(recorded))
    echoed = measure(bare, case, messages, costs)
    for request_id, times in bare.ready_times().items():
        costs.latency += [arrival - ready for ready, (arrival, _) in zip(times, echoed[request_id], strict=True)]
    if bodies(echoed) != bodies(recorded):
        raise AssertionError("the two servers did not send the same messages")


def bodies(received: Received) -> dict[str, list[bytes]]:
    return {request_id: [raw for _, raw in arrived] for request_id, arrived in received.items()}


def results(case: Case, costs: dict[str, Costs]) -> list[Result]:
    name, ours = case.name, costs[OURS]
    return [
        Result(f"{name}: server CPU a token, ours / bare", median_ratio(ours.cpu, costs["bare"].cpu), "x", FLOOR, GOAL),
        Result(f"{name}: server CPU a token, ours / bare on our loop",
               median_ratio(ours.cpu, costs["bare on our loop"].cpu), "x"),
        Result(f"{name}: of ours the counting engine's thread", statistics.median(ours.engine), "us"),
        *(Result(f"{name}: server CPU a token, {which}", statistics.median(each.cpu), "us")
          for which, each in costs.items()),
        *(Result(f"{name}: token ready to client, {which}, p99", each.latency_p99() * 1e3, "ms")
          for which, each in costs.items()),
    ]


def measured(num_rounds: int, which: list[Case]) -> list[Result]:
    """The whole comparison."""
    costs = {case: new_costs() for case in which}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(server_process(kind)) for name, kind in KINDS.items()}
        for case in which:
            compare(servers, case, new_costs(), seed=0)  # warm-up
        for number in range(1, num_rounds + 1):
            for case, each in costs.items():
                compare(servers, case, each, number)
            print(f"CPU: round {number} of {num_rounds} done", file=sys.stderr, flush=True)
    return [result for case, each in costs.items() for result in results(case, each)]


def new_costs() -> dict[str, Costs]:
    """Of each server."""
    return {name: Costs() for name in KINDS}
