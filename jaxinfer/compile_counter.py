"""Counts the programs JAX builds, so that "nothing compiles while serving" is a number."""

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable

from jax import monitoring

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""Recorded by jax around every compile of a program, and around every load of one from the persistent cache."""

CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
"""Recorded inside the former, on the same thread, when the persistent cache had the program."""

MAX_NAMES = 16
"""Function names kept, to say in a message what was compiled."""


class CompileCounter:
    """Compiles since the counter was made, until it is closed or forgotten.

    count: compiles and loads from the persistent cache, of which `loaded` were loads. names: of the latest few.
    """

    def __init__(self):
        self.count = 0
        self.loaded = 0
        self.names: deque[str] = deque(maxlen=MAX_NAMES)
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._stop_listening = weakref.finalize(self, listen(weakref.ref(self)))

    def watch_this_thread(self) -> None:
        """From now on count only what the calling thread compiles.

        jax tells every listener of a process about every program in it: without this, an engine would count the warm-up
        of a second one, and what the user of a notebook compiles beside it.
        """
        self._thread = threading.get_ident()

    def close(self) -> None:
        """Stop counting; the numbers stay."""
        self._stop_listening()

    def hear(self, event: str, name: str) -> None:
        """An event of jax's monitoring, on the thread that compiles."""
        if self._thread not in (None, threading.get_ident()):
            return
        with self._lock:
            if event == CACHE_HIT_EVENT:
                self.loaded += 1
            elif event == COMPILE_EVENT:
                self.count += 1
                self.names.append(name)


def listen(counter: "weakref.ref[CompileCounter]") -> Callable[[], None]:
    """Register listeners that do not keep the counter alive; returns the function that takes them away again."""

    def on_duration(event: str, duration_secs: float, **details: str | int) -> None:
        on_event(event, **details)

    def on_event(event: str, **details: str | int) -> None:
        if (target := counter()) is not None:
            target.hear(event, str(details.get("fun_name", "")))

    def stop() -> None:
        # jax asserts that it knows the listener; somebody may have cleared them all.
        with contextlib.suppress(AssertionError, ValueError):
            monitoring.unregister_event_duration_listener(on_duration)
        with contextlib.suppress(AssertionError, ValueError):
            monitoring.unregister_event_listener(on_event)

    monitoring.register_event_duration_secs_listener(on_duration)
    monitoring.register_event_listener(on_event)
    return stop
