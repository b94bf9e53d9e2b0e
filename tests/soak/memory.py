"""The memory of a server over a while."""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from server_process import ServerProcess

Samples = list[tuple[float, int]]
"""Seconds, resident bytes."""


@contextmanager
def memory_of(server: ServerProcess) -> Iterator[Samples]:
    """Looked at five times a second."""
    samples: Samples = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            samples.append((time.monotonic(), server.memory()))

    thread = threading.Thread(target=look, name="memory")
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def slope_of(samples: Samples) -> float:
    """Bytes a second, of the line that fits best."""
    return statistics.linear_regression(*zip(*samples, strict=True)).slope
