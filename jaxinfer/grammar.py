"""Grammars of one model: compiled off the engine's thread, kept for the next request that brings the same one."""

import importlib.util
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from functools import cached_property
from typing import TYPE_CHECKING

from jaxinfer.errors import EngineClosed, GrammarFailed, InvalidRequest, Overloaded
from jaxinfer.fault_points import fault_point
from jaxinfer.grammar_check import Bounds, GrammarCheck, first_problem
from jaxinfer.grammar_matcher import Matcher
from jaxinfer.grammar_vocabulary import Vocabulary
from jaxinfer.llguidance_binding import grammar_text, library, make_matcher, make_tokenizer, problem_of
from jaxinfer.request_limits import DEFAULT_LIMITS, RequestLimits
from jaxinfer.structured_output import FIELD, checked
from jaxinfer.types import StructuredOutput

if TYPE_CHECKING:
    import llguidance

    from jaxinfer.tokenizer import Tokenizer

NUM_WORKERS = 2
"""Grammars compiled at a time, each with a child process of its own."""
MAX_WAITING = 64
"""Grammars that wait for a worker or are being compiled."""
MAX_WAIT_SECONDS = 30.0
MAX_KEPT = 32
"""Compiled grammars kept; a hostile one may hold some 25 MB of lexer states."""
CLOSED = "the server is stopping; send the request elsewhere"
MAX_REBUILD_SECONDS = 0.1
"""A grammar that took longer to compile is not compiled again on the engine's thread."""


def are_possible(tokenizer: "Tokenizer | None") -> bool:
    """Whether any request could have a grammar: there are tokens with texts, and the library is installed."""
    return tokenizer is not None and importlib.util.find_spec("llguidance") is not None


class CompiledGrammar:
    """One grammar, ready to use. Thread-safe. Rows share a lexer and what it has learnt, which makes masks about five
    times faster; where one row drives it over a limit it is broken for all, and each makes its own.

    kind: the field of StructuredOutput, for messages. seconds: what compiling took.
    """

    def __init__(self, wanted: StructuredOutput, text: str, vocabulary: Vocabulary, first: "llguidance.LLMatcher",
                 tokenizer: "llguidance.LLTokenizer", seconds: float):
        self.kind = wanted.kind
        self.vocabulary = vocabulary
        self.seconds = seconds
        self.names_tokens = wanted.grammar is not None and "<" in wanted.grammar
        """Whether it may name tokens by id, even those that no text may have."""
        self._text = text
        self._tokenizer = tokenizer
        self._first: llguidance.LLMatcher | None = first
        self._lock = threading.Lock()

    @property
    def is_usable(self) -> bool:
        """Whether new rows may begin: not so once a shared lexer broke that takes long to make again."""
        return self._first is not None or self.seconds <= MAX_REBUILD_SECONDS

    def matcher(self) -> Matcher:
        """For a row at the start of its output. Raises GrammarFailed."""
        return Matcher(self, self.start())

    def start(self) -> "llguidance.LLMatcher":
        """llguidance's matcher at the start of the output, its lexer shared with others. Raises GrammarFailed."""
        with self._lock:
            if self._first is None:
                self._first = self._made()
            return self._first.deep_copy()

    def rebuilt(self) -> "llguidance.LLMatcher":
        """One that shares nothing, for a row whose shared lexer broke; that one is given up. Raises GrammarFailed."""
        with self._lock:
            self._first = None
        return self._made()

    def _made(self) -> "llguidance.LLMatcher":
        if self.seconds > MAX_REBUILD_SECONDS:
            raise GrammarFailed(f"{FIELD}.{self.kind}", f"broke its limits, and compiling it again takes "
                                f"{self.seconds:.1f} s (limit {MAX_REBUILD_SECONDS:g} s); make it simpler")
        found = make_matcher(self._tokenizer, self._text)
        if found.is_error():
            raise GrammarFailed(f"{FIELD}.{self.kind}", f"cannot be compiled again: {problem_of(found)}")
        return found


class Grammars:
    """Compiles grammars for one model. Thread-safe, but for the engine's thread: `compile` waits.

    tokenizer: the model's. vocab_size: V of its logits; ids that spell no text are never legal. eos_ids: the model's
    end-of-sequence ids, legal where the output is complete, and only there.
    """

    def __init__(self, tokenizer: "Tokenizer | None", vocab_size: int, eos_ids: Sequence[int],
                 bounds: Bounds | None = None, limits: RequestLimits = DEFAULT_LIMITS):
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._limits = limits
        self._bounds = bounds or Bounds(seconds=limits.grammar_seconds)
        self._lock = threading.Lock()
        self._building = threading.RLock()
        self._kept: OrderedDict[StructuredOutput, Future[CompiledGrammar]] = OrderedDict()
        self._num_waiting = 0
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._checks: list[GrammarCheck] = []
        self._free: list[GrammarCheck] = []

    def start(self) -> None:
        """Does now what the first grammar would wait for: token table and one child process, about 2 s at V 131,072.

        Raises InvalidRequest where the model or the installation cannot do grammars.
        """
        _ = self._tokenizer
        check = self._taken_check()
        try:
            check.start()
        finally:
            self._give_back(check)

    def start_soon(self) -> None:
        """`start` without waiting for it. What it would raise is raised by the first grammar."""
        with self._lock:
            if not self._closed:
                self._workers().submit(self.start)

    def compile(self, wanted: StructuredOutput) -> CompiledGrammar:
        """Waits for the compiled grammar: milliseconds, at most `Bounds.seconds` for the check and its like for the
        rest.

        Raises InvalidRequest for what cannot be compiled and Overloaded when too many are waiting.
        """
        fault_point("grammar")
        future = self.submit(wanted)
        try:
            error = future.exception(MAX_WAIT_SECONDS)
        except FutureTimeout:
            raise Overloaded(f"no grammar could be compiled for {MAX_WAIT_SECONDS:g} s; try again later") from None
        except CancelledError:
            raise EngineClosed(CLOSED) from None
        if isinstance(error, GrammarRefused):  # each caller's own: a kept one would hold on to every caller's frames
            raise GrammarRefused(error.kind, error.problem, error.is_certain)
        return future.result()

    def submit(self, wanted: StructuredOutput) -> "Future[CompiledGrammar]":
        """The same without waiting. Raises at once what `compile` would raise at once."""
        wanted = checked(wanted, self._limits)
        _ = self._vocabulary
        library()
        with self._lock:
            found = self._kept.get(wanted)
            if found is not None and _is_good(found):
                self._kept.move_to_end(wanted)
                return found
            if self._closed:
                raise EngineClosed(CLOSED)
            if self._num_waiting >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} grammars are waiting to be compiled, which is the limit; "
                                 "try again later")
            self._num_waiting += 1
            future = self._kept[wanted] = self._workers().submit(self._compiled, wanted)
            self._evict()
        future.add_done_callback(lambda _: self._finish(wanted))
        return future

    def close(self) -> None:
        """Ends the workers and their processes."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
            checks, self._checks, self._free = self._checks, [], []
            self._kept.clear()
        for check in checks:
            check.close()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_WORKERS, "jaxinfer-grammar")
        return self._pool

    @property
    def _vocabulary(self) -> Vocabulary:
        with self._building:
            return self._read

    @cached_property
    def _read(self) -> Vocabulary:
        return Vocabulary.of(self._source, self._vocab_size, self._eos_ids)

    @property
    def _tokenizer(self) -> "llguidance.LLTokenizer":
        with self._building:  # at large vocabularies it takes seconds: not twice
            return self._built

    @cached_property
    def _built(self) -> "llguidance.LLTokenizer":
        return make_tokenizer(self._vocabulary.table, self._eos_ids)

    def _compiled(self, wanted: StructuredOutput) -> CompiledGrammar:
        """On a worker's thread."""
        text = grammar_text(wanted)
        check = self._taken_check()
        try:
            verdict = check.check(text)
        finally:
            self._give_back(check)
        tokenizer, began = self._tokenizer, time.monotonic()
        if verdict.problem:
            raise GrammarRefused(wanted.kind, verdict.problem, verdict.is_certain)
        first = make_matcher(tokenizer, text)
        seconds = time.monotonic() - began
        if problem := first_problem(first):
            raise GrammarRefused(wanted.kind, problem, True)
        return CompiledGrammar(wanted, text, self._vocabulary, first, tokenizer, seconds)

    def _finish(self, wanted: StructuredOutput) -> None:
        with self._lock:
            self._num_waiting -= 1
            future = self._kept.get(wanted)
            if future is None or not future.done():
                return
            error = None if future.cancelled() else future.exception()
            # A slow machine may break a bound by chance; what is wrong for certain need not be tried again.
            if future.cancelled() or (error is not None and not getattr(error, "is_certain", False)):
                del self._kept[wanted]

    def _evict(self) -> None:
        done = [wanted for wanted, future in self._kept.items() if future.done()]
        for wanted in done[:max(0, len(self._kept) - MAX_KEPT)]:
            del self._kept[wanted]

    def _taken_check(self) -> GrammarCheck:
        with self._lock:
            if self._closed:
                raise EngineClosed(CLOSED)
            if self._free:
                return self._free.pop()
            check = GrammarCheck(self._vocabulary.table, self._eos_ids, self._bounds)
            self._checks.append(check)
            return check

    def _give_back(self, check: GrammarCheck) -> None:
        with self._lock:
            if not self._closed:
                self._free.append(check)
                return
        check.close()  # it may have started its child behind `close`


def _is_good(future: "Future[CompiledGrammar]") -> bool:
    """Whether to wait for it, or to take its grammar or its error."""
    return not future.done() or (not future.cancelled() and (
        future.exception() is not None or future.result().is_usable))


class GrammarRefused(InvalidRequest):
    """A grammar that cannot be compiled: of which kind, why, and whether it would be so another time."""

    def __init__(self, kind: str, problem: str, is_certain: bool):
        super().__init__(f"{FIELD}.{kind}", f"cannot be compiled: {problem}")
        self.kind = kind
        self.problem = problem
        self.is_certain = is_certain
