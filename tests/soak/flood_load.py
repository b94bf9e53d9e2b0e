"""More requests than a server can take, sent at their times whatever comes back."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
from tqdm import tqdm

from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.retry_hint import KEY

PATH = "/jaxinfer.v1.GenerationService/GenerateStream"
REQUEST = pb.GenerateRequest(text="import os\nimport", sampling=pb.SamplingParams(
    max_tokens=16, temperature=0, ignore_eos=True)).SerializeToString()
CHANNELS = 8
CALLERS = 6
"""Of the measurement of what the server can take: a few more than there are rows."""


@dataclass
class Flooded:
    """Seconds, from each call's own beginning. per_second: answers, while the flood ran. recovery: from the last
    request sent until one was answered as on a quiet server again.
    """

    quiet_first: float = 0.0
    capacity: float = 0.0
    rate: float = 0.0
    per_second: float = 0.0
    recovery: float = 0.0
    first: list[float] = field(default_factory=list)
    rejects: list[float] = field(default_factory=list)
    without_hint: int = 0
    codes: Counter[str] = field(default_factory=Counter)


def flood(address: str, seconds: float, times: float, shows: bool) -> Flooded:
    """`times` the capacity, which is measured first, for `seconds`."""
    return asyncio.run(_flood(address, seconds, times, shows))


async def _flood(address: str, seconds: float, times: float, shows: bool) -> Flooded:
    found = Flooded()
    channels = [grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
                for _ in range(CHANNELS)]
    firsts = [await first_token(channels[0], Flooded()) for _ in range(10)]
    found.quiet_first = max(firsts)
    found.capacity = await capacity(channels, min(seconds, 5.0))
    await send_all(channels, found, seconds, times * found.capacity, shows)
    for channel in channels:
        await channel.close()
    return found


async def capacity(channels: list[grpc.aio.Channel], seconds: float) -> float:
    """Requests that are answered a second when there is always one waiting."""
    end, done = time.monotonic() + seconds, Flooded()

    async def caller(channel: grpc.aio.Channel) -> None:
        while time.monotonic() < end:
            await first_token(channel, done)

    began = time.monotonic()
    await asyncio.gather(*(caller(channels[index % CHANNELS]) for index in range(CALLERS)))
    return done.codes["OK"] / (time.monotonic() - began)


async def send_all(channels: list[grpc.aio.Channel], found: Flooded, seconds: float, rate: float, shows: bool) -> None:
    tasks: list[asyncio.Task[float]] = []
    began, number = time.monotonic(), round(seconds * rate)
    for index in tqdm(range(number), desc="flood", disable=not shows):
        await asyncio.sleep(max(began + index / rate - time.monotonic(), 0))
        tasks.append(asyncio.create_task(first_token(channels[index % CHANNELS], found)))
    ended = time.monotonic()
    found.rate, found.per_second = number / (ended - began), found.codes["OK"] / (ended - began)
    # A flood is over when a request is again answered as before it.
    while await first_token(channels[0], Flooded()) > 2 * found.quiet_first and time.monotonic() - ended < 60:
        await asyncio.sleep(0.02)
    found.recovery = time.monotonic() - ended
    await asyncio.gather(*tasks)


async def first_token(channel: grpc.aio.Channel, found: Flooded) -> float:
    """Sends one and notes how it went; seconds to its first token, infinite if it was refused."""
    began, first = time.monotonic(), float("inf")
    call = channel.unary_stream(PATH)(REQUEST, timeout=300)
    try:
        async for _ in call:
            first = min(first, time.monotonic() - began)
    except grpc.aio.AioRpcError as error:
        found.codes[error.code().name] += 1
        found.rejects.append(time.monotonic() - began)
        found.without_hint += KEY not in dict(error.trailing_metadata())
        return float("inf")
    found.codes["OK"] += 1
    found.first.append(first)
    return first
