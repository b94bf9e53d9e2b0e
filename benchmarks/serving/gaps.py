"""Do tokens come as evenly as the device makes them, at 80 % of what the server can do?

A token waits for one step, at most the longest that the engine declares (`paced.longest_step`); what a stream stands
still for beyond that is the host's doing: the scheduler, the service, gRPC, and this client, which runs on the same
cores. Capacity is measured first, in a closed loop of more users than rows; then requests arrive in an open loop, at
moments of a Poisson process.
"""

import asyncio
import itertools
import random
import statistics
from dataclasses import dataclass

from benchmarks.report import Result
from benchmarks.serving.open_loop import Answer, calling, closed_loop, load, open_loop, poisson
from benchmarks.serving.paced import CONFIG, Step, longest_step
from benchmarks.serving.processes import ServerProcess, server_process
from benchmarks.serving.wire import SERVICES, Service

LOAD = 0.8
FLOOR, GOAL = 1.5, 1.1
NUM_USERS = CONFIG.max_num_seqs * 3 // 2
MAX_WAITING = 4096


@dataclass(frozen=True, slots=True)
class Length:
    """Seconds: of measuring the capacity, its first part that does not count, and of the load."""

    capacity: float = 8.0
    ramp: float = 3.0
    load: float = 30.0


QUICK = Length(2.0, 0.5, 1.0)


async def capacity(address: str, service: Service, length: Length) -> float:
    """Requests a second that the server answers while some always wait."""
    rng = random.Random(0)
    requests = load(service, 4096, "capacity", rng)
    async with calling(address, service) as call:
        answers = await closed_loop(call, requests, NUM_USERS, length.capacity)
    began = min(answer.sent for answer in answers)
    tokens = [(moment - began, count) for answer in answers for moment, count in answer.token_times(service)]
    in_time = sum(count for moment, count in tokens if length.ramp <= moment < length.capacity)
    per_request = sum(count for _, count in tokens) / len(answers)
    return in_time / (length.capacity - length.ramp) / per_request


async def under_load(address: str, service: Service, rate: float, seconds: float) -> list[Answer]:
    rng = random.Random(1)
    moments = list(poisson(rate, seconds, rng))
    requests = load(service, len(moments), "load", rng)
    async with calling(address, service) as call:
        return await open_loop(call, requests, moments)


def gaps(service: Service, answers: list[Answer]) -> list[float]:
    """Seconds between a stream's messages with tokens. Those inside a message are 0 and do not count."""
    found: list[float] = []
    for answer in answers:
        times = [moment for moment, _ in answer.token_times(service)]
        found += [later - earlier for earlier, later in itertools.pairwise(times)]
    return found


def p99(values: list[float]) -> float:
    """NaN of nothing, which reaches no floor."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100)[98]


def of_steps(steps: list[Step]) -> list[float]:
    """The gaps that a host without any delay would show: each row of a step waits for the step."""
    return [step.seconds for step in steps for _ in range(step.num_rows)]


def measure(server: ServerProcess, service: Service, length: Length) -> list[Result]:
    most = asyncio.run(capacity(server.address, service, length))
    for since_the_last in ("steps", "lateness"):
        server.ask(since_the_last)
    before = server.cpu_seconds()
    answers = asyncio.run(under_load(server.address, service, LOAD * most, length.load))
    cpu, steps, late = server.cpu_seconds() - before, server.ask("steps"), server.ask("lateness")
    refused = [answer.code for answer in answers if answer.code != "OK"]
    if refused:
        raise AssertionError(f"{len(refused)} of {len(answers)} requests failed: {refused[0]}")
    gap, name = p99(gaps(service, answers)), f"{service.name}, 80 % load"
    return [
        Result(f"{name}: p99 inter-token gap / longest step", gap / longest_step(), "x", FLOOR, GOAL),
        Result(f"{name}: p99 inter-token gap", gap * 1e3, "ms"),
        Result(f"{name}: longest declared step", longest_step() * 1e3, "ms"),
        Result(f"{name}: p99 gap of the device alone", p99(of_steps(steps)) * 1e3, "ms"),
        Result(f"{name}: p99 lateness of waking the engine", p99(late) * 1e3, "ms"),
        Result(f"{name}: p99 time to first token", p99([answer.first_token for answer in answers]) * 1e3, "ms"),
        Result(f"{name}: capacity", most, "requests/s"),
        Result(f"{name}: requests", len(answers), "requests"),
        Result(f"{name}: server CPU", cpu / length.load * 100, "%"),
    ]


def measured(length: Length) -> list[Result]:
    with server_process("paced", MAX_WAITING) as server:
        return [result for service in SERVICES.values() for result in measure(server, service, length)]
