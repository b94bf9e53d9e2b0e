"""Grammars compiled first where it does not hurt: in a killable process with little stack, memory and time.

llguidance's limits bound nearly every grammar to tens of milliseconds, but not all: an intersection of twenty
expressions runs for minutes, and a chain of some thousand rules overflows the stack, which would end the
server. What passes here compiles in the server as well, where threads have at least twice the stack.
"""

import json
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import IO, Any

from jaxinfer.child_process import NotReady, Worker, limit_memory, send
from jaxinfer.llguidance_binding import TokenTable, make_matcher, make_tokenizer, problem_of


@dataclass(frozen=True, slots=True)
class Bounds:
    """What compiling one grammar may cost: wall seconds; bytes of the child's address space and of its stack."""

    seconds: float = 2.0
    memory_bytes: int = 1024 * 1024 * 1024
    stack_bytes: int = 1024 * 1024


DEFAULT_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Verdict:
    """problem: what is wrong with a grammar, "" for nothing. is_certain: it would be the same another time."""

    problem: str
    is_certain: bool = True


class GrammarCheck:
    """Checks one grammar after the other. Thread-safe; the child starts with the first check."""

    def __init__(self, table: TokenTable, eos_ids: Sequence[int], bounds: Bounds = DEFAULT_BOUNDS):
        self._bounds = bounds
        self._worker = Worker("jaxinfer.grammar_check:serve_checks", partial(_setup, table, eos_ids, bounds))

    def start(self) -> None:
        """Starts the child, which reads the token table: about half a second. A failure is the next check's."""
        with suppress(NotReady):
            self._worker.start()

    def check(self, text: str) -> Verdict:
        """Whether the grammar compiles within the bounds and some token may begin the output."""
        reply = None
        with suppress(NotReady):
            reply = self._worker.ask({"grammar": text}, self._bounds.seconds)
        if reply is None:
            return Verdict(f"compiling it broke the limits ({self._bounds.seconds:g} s, {self._bounds.stack_bytes} "
                           f"bytes of stack, {self._bounds.memory_bytes} bytes of memory); make it simpler",
                           is_certain=False)  # fmt: skip
        return Verdict(reply["problem"])

    def close(self) -> None:
        """Ends the child. A later check starts a new one."""
        self._worker.close()


def _setup(table: TokenTable, eos_ids: Sequence[int], bounds: Bounds) -> dict[str, Any]:
    # Latin-1 is a character a byte, so JSON can carry the tokens.
    return {"tokens": [token.decode("latin-1") for token in table.tokens], "special": list(table.special_token_ids),
            "eos": list(eos_ids), "bounds": asdict(bounds)}


def first_problem(matcher: Any) -> str:
    """Why this fresh matcher is of no use; "" if it is. Computes the first mask."""
    if not matcher.is_error():
        matcher.compute_bitmask()
    problem = problem_of(matcher)
    return "no output satisfies it" if problem.startswith("NoExtension") else problem


# --- Everything below runs in the child. ---


def serve_checks(setup: Mapping[str, Any], jobs: IO[bytes], replies: IO[bytes]) -> None:
    """The child's loop: a line with a grammar in, a line with its problem out."""
    bounds = Bounds(**setup["bounds"])
    tokens = [token.encode("latin-1") for token in setup["tokens"]]
    tokenizer = make_tokenizer(TokenTable(tokens, setup["special"], setup["eos"][0]), setup["eos"])
    limit_memory(bounds.memory_bytes)
    threading.stack_size(bounds.stack_bytes)
    send(replies, {"ready": True})
    for line in jobs:
        send(replies, {"problem": _in_thread(partial(_problem, tokenizer, line), bounds.seconds)})


def _problem(tokenizer: Any, line: bytes) -> str:
    return first_problem(make_matcher(tokenizer, json.loads(line)["grammar"]))


def _in_thread(work: Callable[[], str], seconds: float) -> str:
    """`work` on the small stack; the alarm ends the process, for the case that the parent died meanwhile."""
    found = ["the compiler failed on it"]  # stays where a panic ends the thread

    def run() -> None:
        found[0] = work()

    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return found[0]
