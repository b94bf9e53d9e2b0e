"""Named places where a test lets something go wrong, to see what goes with it and what goes on. No jax here.

    with failing("dispatch", RuntimeError("no device"), after=3):
        ...

The one state of a process that is not passed along: a fault must reach its place without changing the way there.
Nothing outside of tests arms one; a place where nothing is armed costs a look into an empty dict.
"""

import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Harm(enum.Enum):
    """What a fault may take along."""

    START = "the start: it is refused with the reason, and nothing is served"
    REQUEST = "the request it happens in ends, with its error"
    STEP = "nothing: rows are recomputed from their tokens"
    ENGINE = "the engine: every request ends with UNAVAILABLE, and the process with a status that is not 0"


POINTS = {
    "compile": Harm.START,  # one of the programs
    "receive": Harm.REQUEST,  # a message is made a request, on the event loop
    "intake": Harm.REQUEST,  # prompt and parameters are checked, wherever that runs
    "tokenize": Harm.REQUEST,
    "template": Harm.REQUEST,
    "grammar": Harm.REQUEST,  # is compiled
    "admit": Harm.REQUEST,  # the engine's thread takes a request in
    "mask": Harm.REQUEST,  # a row's grammar says what is legal
    "commit": Harm.REQUEST,  # a row takes its tokens in
    "consume": Harm.REQUEST,  # tokens become text and messages
    "plan": Harm.STEP,
    "dispatch": Harm.STEP,
    "read": Harm.STEP,  # the results of a step
    "account": Harm.STEP,  # behind the rows that took in their tokens
    "reset": Harm.ENGINE,  # new pages after a failed step
    "loop": Harm.ENGINE,  # between steps
}
"""Every place, and what a fault there may take along."""


@dataclass
class Fault:
    """error: raised at each pass but the first `after`, `times` times, where the subject begins with `subject`."""

    error: BaseException
    after: int = 0
    times: int = 1
    subject: str = ""
    passes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def raised(self) -> int:
        """How often."""
        return min(max(self.passes - self.after, 0), self.times)

    def hit(self, subject: str) -> None:
        if not subject.startswith(self.subject):
            return
        with self.lock:
            self.passes += 1
            is_due = self.after < self.passes <= self.after + self.times
        if is_due:
            raise self.error


_armed: dict[str, Fault] = {}


def fault_point(name: str, subject: str = "") -> None:
    """A place of POINTS. subject: the id of the request it is about, if of one."""
    if _armed and name in _armed:
        _armed[name].hit(subject)


@contextmanager
def failing(name: str, error: BaseException, *, after: int = 0, times: int = 1, subject: str = "") -> Iterator[Fault]:
    """Arms a place meanwhile. Raises ValueError for one that is armed or that there is not."""
    if name not in POINTS or name in _armed:
        raise ValueError(f"{name!r} is armed already or is no fault point; there are {', '.join(POINTS)}")
    fault = _armed[name] = Fault(error, after, times, subject)
    try:
        yield fault
    finally:
        del _armed[name]
