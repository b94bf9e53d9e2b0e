"""Lines for a reader that may stop reading: they wait in a bounded queue, and a thread of its own writes them."""

import logging
import os
import select
import threading
from collections import deque

log = logging.getLogger(__name__)

MOST_WAITING_BYTES = 4 * 1024 * 1024
"""What may wait for the reader; about 16,000 lines of a request log."""


class LineWriter:
    """Writes lines to a file descriptor. `put` never waits, whatever becomes of the reader.

    It writes past Python's own streams: a thread that is blocked in one of those holds its lock, at which the
    interpreter's end would abort.
    """

    def __init__(self, descriptor: int, most_waiting: int = MOST_WAITING_BYTES):
        """most_waiting: bytes; a line that would make them more is dropped."""
        self.num_dropped = 0
        """Lines that found no place, or that could not be written."""
        self._descriptor = descriptor
        self._most_waiting = most_waiting
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        """Of all lines that are not written, with the one that is being written."""
        self._num_told = 0
        self._ended = False
        # Reentrant: what runs in the middle of `put`, such as a finalizer, may log too.
        self._changed = threading.Condition(threading.RLock())
        threading.Thread(target=self._run, name=f"jaxinfer-lines-{descriptor}", daemon=True).start()

    def put(self, line: str) -> None:
        """line: without its newline."""
        data = f"{line}\n".encode(errors="backslashreplace")
        with self._changed:
            if self._ended or self._num_bytes + len(data) > self._most_waiting:
                self.num_dropped += 1
                return
            self._lines.append(data)
            self._num_bytes += len(data)
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Waits until all lines are written, for so long at most; returns whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_bytes, seconds)

    def close(self, seconds: float) -> None:
        """`flush`; nothing can be put from then on, and the thread ends once its reader lets it."""
        self.flush(seconds)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (data := self._next()) is not None:
            written = self._write(data)
            with self._changed:
                self._num_bytes -= len(data)
                self.num_dropped += not written
                has_caught_up = written and not self._lines
                self._changed.notify_all()
            if has_caught_up:
                self._tell()

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ended)
            return self._lines.popleft() if not self._ended else None

    def _write(self, data: bytes) -> bool:
        """Returns whether all of it was."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest):]
            except BlockingIOError:  # whoever shares the stream has set it so
                self._wait_for_room()
            except OSError:  # the reader has left, or the disk is full: a log cannot say so
                return False
        return True

    def _wait_for_room(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll()

    def _tell(self) -> None:
        """Says once more how many were dropped, if there were more."""
        if self.num_dropped > self._num_told:
            self._num_told = self.num_dropped
            log.warning("%d lines were dropped since the start: their reader had stopped", self._num_told)
