"""Tells an engine, or an event loop, that hangs from one that is busy: the busy one gets on.

A thread of its own looks at numbers that change whenever something was done. It counts the time in its own looks, so
that a process that was stopped or starved meanwhile does not appear to have hung. It acts first and logs then, and
waits for the log for a moment only: what blocks the log may be what hangs.
"""

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks."""
LOG_SECONDS = 1.0
"""What the log may take for a line."""

Progress = Callable[[], int | None]
"""A number that changes whenever there was progress; None while there is nothing to do."""


@dataclass
class Watched:
    """What must get on.

    stuck: called once it has not for the watchdog's seconds, with a text that says so; freed: when it gets on again.
    Both on the watchdog's thread.
    """

    name: str
    progress: Progress
    stuck: Callable[[str], None]
    freed: Callable[[], None] = lambda: None
    seconds: float = 0.0
    """For which it has not got on."""
    is_stuck: bool = False
    _last: int | None = field(default=None, init=False)

    def look(self, passed: float, limit: float) -> Callable[[], None] | None:
        """passed: seconds since the last look. Returns what logs what was found and done, if there is something."""
        now = self.progress()
        self.seconds = self.seconds + passed if now is not None and now == self._last else 0.0
        self._last = now
        if self.is_stuck and not self.seconds:
            self.is_stuck = False
            self.freed()
            return partial(log.warning, "the %s gets on again", self.name)
        if not self.is_stuck and self.seconds >= limit:
            self.is_stuck = True
            text = f"the {self.name} has work and has not got on for {self.seconds:.0f} s, the limit is {limit:g} s"
            self.stuck(text)
            return lambda: log.critical("%s; what all threads do:\n%s", text, stacks())
        return None


class Watchdog:
    """seconds: after which something that has not got on is stuck. exit_seconds: after which `give_up` is called, on
    the watchdog's thread; 0 is never.
    """

    def __init__(self, watched: list[Watched], seconds: float, exit_seconds: float = 0.0,
                 give_up: Callable[[], None] = lambda: None):
        self._watched = watched
        self._seconds = seconds
        self._exit_seconds = exit_seconds
        self._give_up = give_up
        self._ended = threading.Event()
        self._writing: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="jaxinfer-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits for a look that is being taken: what it calls may be gone afterwards."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * LOOK_SECONDS)

    def look(self, passed: float) -> None:
        """What the thread does every LOOK_SECONDS."""
        for one in self._watched:
            if (write := one.look(passed, self._seconds)) is not None:
                self._log(write)
            if self._exit_seconds and one.seconds >= self._exit_seconds:
                self._log(partial(log.critical, "the %s has not got on for %.0f s; the process ends", one.name,
                                  one.seconds))
                self._give_up()

    def _log(self, write: Callable[[], None]) -> None:
        """Nothing is written while what was last written is still blocked."""
        if self._writing is not None and self._writing.is_alive():
            return
        writing = threading.Thread(target=write, name="jaxinfer-watchdog-log", daemon=True)
        try:
            writing.start()
        except RuntimeError:  # no more threads: that may be what hangs, and acting goes on
            return
        self._writing = writing
        writing.join(LOG_SECONDS)

    def _run(self) -> None:
        interval = min(LOOK_SECONDS, self._seconds / 4)
        before = time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            self.look(min(now - before, 2 * interval))
            before = now


class LoopPulse:
    """Progress of an event loop: how many of the calls that it was asked to make it has made."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]):
        """call_soon: `call_soon_threadsafe` of the loop."""
        self._call_soon = call_soon
        self._beats = 0

    def __call__(self) -> int | None:
        try:
            self._call_soon(self._beat)
        except RuntimeError:  # the loop is closed
            return None
        return self._beats

    def _beat(self) -> None:
        self._beats += 1


def stacks() -> str:
    """Of all threads, as a traceback has them."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
                     for ident, frame in sys._current_frames().items())
