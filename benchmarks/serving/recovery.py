"""After a flood: how long from a full queue until users notice nothing any more?

Users send half of what the server can do, all the time. For a while ten times its capacity comes on top, which fills
the queue; then that stops, and the users go on. A user's answer is normal if its first token came within twice the p99
that the same users saw before the flood. Recovery is from the flood's end until the last answer that was refused or
late was over with; nobody empties the queue by leaving, so the server has to compute all that it has accepted.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field

from benchmarks.report import Result
from benchmarks.serving import gaps
from benchmarks.serving.gaps import MAX_WAITING, capacity, p99
from benchmarks.serving.open_loop import Answer, calling, load, open_loop, poisson
from benchmarks.serving.processes import ServerProcess, server_process
from benchmarks.serving.wire import NATIVE

USERS, FLOOD = 0.5, 10.0
"""Of the capacity."""
QUEUE_SECONDS = 1.0
"""The server's max_waiting, in seconds of its capacity."""
LATE = 2.0
FLOOR = 5.0
WATCH_SECONDS = 0.05
REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True, slots=True)
class Length:
    """Seconds before, of and after the flood. capacity: of measuring it first."""

    capacity: gaps.Length = field(default_factory=gaps.Length)
    before: float = 15.0
    flood: float = 10.0
    after: float = 10.0

    @property
    def flood_end(self) -> float:
        return self.before + self.flood


QUICK = Length(gaps.QUICK, 3.0, 1.0, 1.0)


@dataclass(slots=True)
class Run:
    """What came of users and flood. waiting: (time.monotonic(), requests that wait in the server), again and again."""

    users: list[Answer]
    flood: list[Answer]
    waiting: list[tuple[float, int]]

    @property
    def flood_end(self) -> float:
        return max(answer.sent for answer in self.flood)

    def before(self) -> list[float]:
        """Seconds until the users' first tokens before the flood; its own first requests may be among them."""
        begin = min(answer.sent for answer in self.flood)
        return [answer.first_token for answer in self.users if answer.sent + answer.first_token < begin]

    def recovery(self, limit: float) -> float:
        """Seconds from the flood's end to the end of the last wait of a user over `limit` seconds, or refusal."""
        bad = [answer.ended if answer.code != "OK" else answer.sent + answer.first_token
               for answer in self.users if answer.code != "OK" or answer.first_token > limit]
        return max((moment - self.flood_end for moment in bad), default=0.0)

    def queue_seconds(self) -> float:
        """From the flood's end until nothing waited in the server."""
        return next((moment - self.flood_end for moment, count in self.waiting
                     if moment > self.flood_end and not count), float("inf"))

    def most_waiting(self) -> int:
        """In the flood's last second."""
        end = self.flood_end
        return max((count for moment, count in self.waiting if end - 1 < moment <= end), default=0)


async def run(server: ServerProcess, rate: float, length: Length) -> Run:
    """rate: the capacity, in requests a second."""
    rng = random.Random(2)
    user_moments = list(poisson(USERS * rate, length.flood_end + length.after, rng))
    flood_moments = [length.before + moment for moment in poisson(FLOOD * rate, length.flood, rng)]
    users, flood = load(NATIVE, len(user_moments), "user", rng), load(NATIVE, len(flood_moments), "flood", rng)
    waiting: list[tuple[float, int]] = []
    async with calling(server.address, NATIVE) as call, calling(server.address, NATIVE) as others:
        watching = asyncio.create_task(watch(server, waiting))
        answers = await asyncio.gather(open_loop(call, users, user_moments), open_loop(others, flood, flood_moments))
        watching.cancel()
    return Run(*answers, waiting)


async def watch(server: ServerProcess, waiting: list[tuple[float, int]]) -> None:
    while True:
        waiting.append((time.monotonic(), server.ask("load").num_waiting))
        await asyncio.sleep(WATCH_SECONDS)


def measured(length: Length) -> list[Result]:
    with server_process("paced", MAX_WAITING) as server:
        rate = asyncio.run(capacity(server.address, NATIVE, length.capacity))
    max_waiting = round(QUEUE_SECONDS * rate)
    with server_process("paced", max_waiting) as server:
        found = asyncio.run(run(server, rate, length))
    normal = p99(found.before())
    if not found.before():
        raise AssertionError("no user was answered before the flood: nothing says what is normal")
    refused = [answer.ended - answer.sent for answer in found.flood if answer.code == REFUSED]
    otherwise = [answer.code for answer in (*found.users, *found.flood) if answer.code not in ("OK", REFUSED)]
    accepted = [answer.first_token for answer in found.flood if answer.code == "OK"]
    return [
        Result("flood: from full queue to recovery", found.recovery(LATE * normal), "s", FLOOR, FLOOR),
        Result("flood: until nothing waited", found.queue_seconds(), "s"),
        Result("flood: requests waiting in its last second, most", found.most_waiting(), "requests"),
        Result("flood: max_waiting", max_waiting, "requests"),
        Result("flood: p99 time to first token before", normal * 1e3, "ms"),
        Result("flood: p99 time to first token of what was accepted", p99(accepted) * 1e3, "ms"),
        Result("flood: refused", len(refused), "requests"),
        Result("flood: ended by another status", len(otherwise), "requests"),
        Result("flood: p99 time to refusal", p99(refused) * 1e3, "ms"),
    ]
