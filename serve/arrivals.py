"""Chunks on their way from the engine's thread to the event loop, of a bounded number of steps.

An engine that is faster than the loop waits for it here. A loop that has stopped must not stop the engine for good: it
has other consumers, and what it runs holds pages. So the wait is bounded, and then the step is dropped, its requests
end with an error, and the engine goes on with others.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable

from jaxinfer.errors import DeliveryFailed, EngineClosed
from jaxinfer.types import TokenChunk
from serve.doorbell import Doorbell

MOST_STEPS_BEHIND = 32
"""Enough that the loop may be busy with something else for some steps without the engine noticing."""
PATIENCE_SECONDS = 10.0
"""Of the engine, for a loop that takes nothing."""
LOOK_SECONDS = 0.1
"""Between two looks of an engine that waits at whether the loop is still there."""


class Arrivals:
    """A queue of steps with one thread at either end. take: called on the loop with the chunks of each step."""

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Callable[[list[TokenChunk]], None],
                 patience: float = PATIENCE_SECONDS):
        self._take = take
        self._patience = patience
        self._steps: deque[list[TokenChunk]] = deque()
        self._has_room = threading.Event()
        self._doorbell = Doorbell(loop, self._answer)

    def __len__(self) -> int:
        return len(self._steps)

    def put(self, chunks: list[TokenChunk]) -> None:
        """On the engine's thread. A loop that lags is woken once for many steps, and waited for when it lags too far.

        Raises EngineClosed when nobody takes them any more; DeliveryFailed when nobody did for `patience` seconds: then
        they are dropped, and the loop will find the error for each of their requests.
        """
        if len(self._steps) >= MOST_STEPS_BEHIND and not self._wait_for_room():
            error = DeliveryFailed(f"the service has taken no tokens for {self._patience:g} s and is "
                                   f"{len(self._steps)} steps behind its engine; send the request again")
            self._steps.append(failures(chunks, error))
            self._doorbell.ring()  # the loop may have come back meanwhile and found nothing more
            raise error
        self._steps.append(chunks)
        self._ring()

    def close(self) -> None:
        """On the loop's thread; may be called twice. An engine that waits is told."""
        self._doorbell.close()
        self._has_room.set()

    def _wait_for_room(self) -> bool:
        """False when there was none in time."""
        until = time.monotonic() + self._patience
        while True:
            self._has_room.clear()  # before looking: what the loop takes from here on is told
            if len(self._steps) < MOST_STEPS_BEHIND:
                return True
            self._ring()
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._has_room.wait(min(left, LOOK_SECONDS))

    def _ring(self) -> None:
        if not self._doorbell.ring():
            raise EngineClosed("the service has stopped")

    def _answer(self) -> None:
        """Takes what is there now: what comes meanwhile rings again, and the loop serves others before."""
        for _ in range(len(self._steps)):
            self._take(self._steps.popleft())
        if not self._has_room.is_set():
            self._has_room.set()


def failures(chunks: list[TokenChunk], error: DeliveryFailed) -> list[TokenChunk]:
    """In place of a step that was dropped, one chunk for each of its requests: small, and the last of them."""
    indices = {chunk.request_id: chunk.index for chunk in chunks}
    return [TokenChunk(request_id, index, [], finish_reason="error", error=error)
            for request_id, index in indices.items()]
