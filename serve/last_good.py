"""What was read of files that may be replaced at any time, by whoever asks, on any thread."""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxinfer.errors import InvalidConfig
from serve.changed_files import ChangedFiles

log = logging.getLogger(__name__)


class LastGood[T]:
    """Files that cannot be used, as while they are being replaced, leave in force what was read before.

    They are read again with every look until they can be used; each problem is logged once, as long as it lasts.
    """

    def __init__(self, name: str, paths: Sequence[Path], read: Callable[[], T], every: float = 0.0):
        """name: what it is, for the log. every: seconds between two looks. Raises what `read` raises: InvalidConfig."""
        self._name = name
        self._paths = paths
        self._read = read
        self._files = ChangedFiles(paths, every)
        self._lock = threading.Lock()
        self._problem = ""
        self._good = read()

    def get(self) -> T:
        """The same object for as long as nothing new was read."""
        with self._lock:
            if self._files.changed():
                self._renew()
            return self._good

    def _renew(self) -> None:
        try:
            self._good = self._read()
        except InvalidConfig as error:
            self._files.forget()
            if str(error) != self._problem:
                log.error("the last %s stay in force: %s", self._name, error)
            self._problem = str(error)
        else:
            self._problem = ""
            log.info("read new %s from %s", self._name, self._paths[0])
