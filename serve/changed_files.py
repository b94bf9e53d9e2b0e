"""Files that are replaced while the server runs: certificates and tokens."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Signature = tuple[int, ...]


class ChangedFiles:
    """Says once of every state of some files that they are not what they were.

    every: seconds between two looks at the disk. Told by inode, size, time of writing, owner and mode, and by the time
    that one of these changed: a file that is there and may be read only now is a changed one.
    """

    def __init__(self, paths: Sequence[Path], every: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._paths = tuple(paths)
        self._every = every
        self._clock = clock
        self._looked = clock()
        self._seen: tuple[Signature | None, ...] | None = self._signatures()

    def changed(self) -> bool:
        """Whether they changed since this was asked last. Ask before reading: what changes later is told again."""
        now = self._clock()
        if now - self._looked < self._every:
            return False
        self._looked = now
        seen, self._seen = self._seen, self._signatures()
        return seen != self._seen

    def forget(self) -> None:
        """They could not be read: the next look tells them again, since what was in the way may leave no trace."""
        self._seen = None

    def _signatures(self) -> tuple[Signature | None, ...]:
        return tuple(map(_signature, self._paths))


def _signature(path: Path) -> Signature | None:
    """None while there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_uid, found.st_gid,
            found.st_mode)
