"""Ordinary load of all kinds for a while: some callers cancel, some have deadlines."""

import asyncio
import random
import time

import grpc
import honest_messages
from hostile_load import EXPECTED, Answers
from leaving_load import LEAVING, OPTIONS, read
from tqdm import tqdm

CALLERS = 12
ANSWERED = EXPECTED - {"INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION"}


def mix(address: str, seed: int, seconds: float, shows: bool) -> Answers:
    """CALLERS callers, each with one request at a time, for `seconds`."""
    return asyncio.run(_mix(address, random.Random(seed), seconds, shows))


async def _mix(address: str, rng: random.Random, seconds: float, shows: bool) -> Answers:
    answers, end = Answers(), time.monotonic() + seconds

    async def caller() -> None:
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            while time.monotonic() < end:
                await ask(channel, rng, answers)

    async def show() -> None:
        with tqdm(total=round(seconds), desc="mixed load", unit="s", disable=not shows) as progress:
            for _ in range(round(seconds)):
                await asyncio.sleep(1)
                progress.set_postfix(requests=answers.codes.total(), refresh=False)
                progress.update()

    await asyncio.gather(show(), *(caller() for _ in range(CALLERS)))
    return answers


async def ask(channel: grpc.aio.Channel, rng: random.Random, answers: Answers) -> None:
    """A status is expected only where this caller has asked for it."""
    case, way = honest_messages.request(rng), rng.random()
    call = channel.unary_stream(case[0])(case[1], timeout=rng.random() if way < 0.1 else 60)
    reading = asyncio.ensure_future(read(call))
    if 0.1 < way < 0.2:
        await asyncio.wait({reading}, timeout=rng.random())
        call.cancel()
    expected = LEAVING if 0.1 < way < 0.2 else ANSWERED if way < 0.1 else {"OK"}
    answers.add(case, await reading, None, expected)
