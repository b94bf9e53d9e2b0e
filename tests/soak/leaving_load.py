"""Clients that leave: they cancel, run into a deadline, close their connection or are killed, at random moments."""

import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import honest_messages
from hostile_load import EXPECTED, Answers
from tqdm import tqdm

AT_ONCE = 32
LONGEST = 0.4
"""Seconds a call gets at most."""
CALLS_A_CHANNEL = 8
CALLS_A_PROCESS = 25
SHARE_KILLED = 0.1
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
LEAVING = EXPECTED | {"CANCELLED"}

Way = Callable[[str, random.Random, Answers], Awaitable[int]]


def leave(address: str, seed: int, count: int, shows: bool) -> tuple[Answers, Counter[str]]:
    """`count` calls, of which most end early. Returns how they ended as the client saw it, and calls by way of leaving.
    """
    ways: Counter[str] = Counter()
    with tqdm(total=count, desc="disconnects", disable=not shows) as progress:
        killed = kill_clients(address, random.Random(seed), int(count * SHARE_KILLED), progress)
        answers = asyncio.run(_leave(address, random.Random(seed), count - killed, ways, progress))
    ways["process killed"] = killed
    return answers, ways


async def _leave(address: str, rng: random.Random, count: int, ways: Counter[str], progress: tqdm) -> Answers:
    answers = Answers()

    async def work() -> None:
        while ways.total() < count:
            way: Way = rng.choice((cancelled, cancelled, late, closed))
            done = await way(address, rng, answers)
            ways[way.__name__] += done
            progress.update(done)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return answers


async def cancelled(address: str, rng: random.Random, answers: Answers) -> int:
    """Some calls of a connection, each cancelled at a moment of its own."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        await asyncio.gather(*(cancel_one(channel, rng, answers) for _ in range(CALLS_A_CHANNEL)))
    return CALLS_A_CHANNEL


async def cancel_one(channel: grpc.aio.Channel, rng: random.Random, answers: Answers) -> None:
    case = honest_messages.request(rng, 200)
    call = channel.unary_stream(case[0])(case[1])
    reading = asyncio.ensure_future(read(call))
    await asyncio.wait({reading}, timeout=rng.random() * LONGEST)
    call.cancel()
    answers.add(case, await reading, None, LEAVING)


async def late(address: str, rng: random.Random, answers: Answers) -> int:
    """The same with a deadline."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        asked = [honest_messages.request(rng, 200) for _ in range(CALLS_A_CHANNEL)]
        calls = [channel.unary_stream(path)(data, timeout=rng.random() * LONGEST) for path, data in asked]
        for case, code in zip(asked, await asyncio.gather(*map(read, calls)), strict=True):
            answers.add(case, code, None, LEAVING)
    return CALLS_A_CHANNEL


async def closed(address: str, rng: random.Random, answers: Answers) -> int:
    """The connection is closed under its calls."""
    channel = grpc.aio.insecure_channel(address, options=OPTIONS)
    asked = [honest_messages.request(rng, 200) for _ in range(CALLS_A_CHANNEL)]
    reading = [asyncio.ensure_future(read(channel.unary_stream(path)(data))) for path, data in asked]
    await asyncio.sleep(rng.random() * LONGEST)
    await channel.close()
    for case, one in zip(asked, reading, strict=True):
        answers.add(case, await one, None, LEAVING)
    return CALLS_A_CHANNEL


async def read(call: grpc.aio.UnaryStreamCall) -> str:
    """Reads to the end; the name of the status."""
    try:
        async for _ in call:
            pass
    except asyncio.CancelledError:
        return "CANCELLED"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    except grpc.aio.UsageError:  # the channel was closed before the call had begun
        return "CANCELLED"
    return "OK"


def kill_clients(address: str, rng: random.Random, count: int, progress: tqdm) -> int:
    """Processes with CALLS_A_PROCESS streams each are killed; returns the calls that they had."""
    number = -(-count // CALLS_A_PROCESS)
    command = [sys.executable, str(Path(__file__).with_name("leaving_client.py")), address, str(CALLS_A_PROCESS)]
    for _ in range(number):
        with subprocess.Popen([*command, str(rng.randrange(2**32))], stdout=subprocess.PIPE) as client:
            with contextlib.suppress(BrokenPipeError):
                assert client.stdout is not None and client.stdout.readline() == b"asked\n"
            time.sleep(rng.random() * LONGEST)
            client.kill()
        progress.update(CALLS_A_PROCESS)
    return number * CALLS_A_PROCESS
