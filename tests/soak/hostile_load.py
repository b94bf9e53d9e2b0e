"""Sends hostile requests, many at once, and counts what came back. Runs in a process of its own."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

import grpc
from hostile_messages import Case, cases
from tqdm import tqdm

AT_ONCE = 24
SECONDS = 2.0
"""Deadline of each: some are valid and long."""
EXPECTED = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "FAILED_PRECONDITION"}


@dataclass
class Answers:
    """codes: by status. unexpected: some of the cases with another status than was expected."""

    codes: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)

    def add(self, case: Case, code: str, details: str | None, expected: Set[str] = frozenset(EXPECTED)) -> None:
        self.codes[code] += 1
        if code not in expected and len(self.unexpected) < 10:
            path, data = case
            self.unexpected.append(f"{code}: {path} {data[:200]!r} ({len(data)} bytes): {details}")


def send(address: str, seed: int, count: int, shows: bool) -> Answers:
    """`count` cases of the sequence that `seed` names."""
    return asyncio.run(_send(address, itertools.islice(cases(random.Random(seed)), count), count, shows))


async def _send(address: str, asked: Iterator[Case], count: int, shows: bool) -> Answers:
    answers = Answers()
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with tqdm(total=count, desc="hostile requests", disable=not shows) as progress:
        async def work() -> None:
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                for case in asked:
                    answers.add(case, *await status_of(channel, case))
                    progress.update()

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return answers


async def status_of(channel: grpc.aio.Channel, case: Case) -> tuple[str, str | None]:
    """The name of the status of a call, and its text. Calls of one answer look like streams of one message."""
    path, data = case
    call = channel.unary_stream(path)(data, timeout=SECONDS)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details()
    return "OK", None
