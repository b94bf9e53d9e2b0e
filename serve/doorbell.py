"""Wakes an event loop from another thread."""

import asyncio
import os
import threading
from collections.abc import Callable


class Doorbell:
    """`ring` (any thread) has `answer` called on the loop; rings before that are one.

    An eventfd where there is one (Linux): `call_soon_threadsafe` makes a handle and goes through a socket pair, which
    was measured to cost 35 us more a wake-up, and a stream has one for every step of the engine.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Callable[[], None]):
        self._loop = loop
        self._answer = answer
        self._lock = threading.Lock()  # a ring must not write to a descriptor that is being closed
        self._rung = False
        self._closed = False
        self._descriptor: int | None = None
        if hasattr(os, "eventfd"):
            self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            loop.add_reader(self._descriptor, self._heard)

    def ring(self) -> bool:
        """False when nobody will answer any more."""
        with self._lock:
            if self._closed or self._loop.is_closed():
                return False
            if not self._rung:
                self._rung = True
                self._wake()
            return True

    def close(self) -> None:
        """On the loop's thread; may be called twice."""
        with self._lock:
            closed, self._closed = self._closed, True
        if self._descriptor is not None and not closed:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)

    def _wake(self) -> None:
        if self._descriptor is not None:
            os.eventfd_write(self._descriptor, 1)
        else:
            self._loop.call_soon_threadsafe(self._heard)

    def _heard(self) -> None:
        if self._descriptor is not None:
            os.eventfd_read(self._descriptor)
        self._rung = False  # before answering: what comes during the answer rings again
        self._answer()
