"""Files that are replaced while the server runs: certificates and tokens."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Signature = tuple[tuple[int, int, int] | None, ...]


class ChangedFiles:
    """Says once of every state of some files that they are not what they were.

    every: seconds between two looks at the disk. A replaced file is told by its inode, size or time of writing.
    """

    def __init__(self, paths: Sequence[Path], every: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._paths = tuple(paths)
        self._every = every
        self._clock = clock
        self._looked = clock()
        self._seen = self._signature()

    def changed(self) -> bool:
        """Whether they changed since this was asked last. Ask before reading: what changes later is told again."""
        now = self._clock()
        if now - self._looked < self._every:
            return False
        self._looked = now
        seen, self._seen = self._seen, self._signature()
        return seen != self._seen

    def _signature(self) -> Signature:
        return tuple(map(_signature, self._paths))


def _signature(path: Path) -> tuple[int, int, int] | None:
    """None while there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
