"""The one core behind all services of a server: refused while it loads and once the server stops."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxinfer.core import Core
from jaxinfer.errors import EngineClosed, Overloaded, TokenizerMissing
from jaxinfer.fault_points import fault_point
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import Request, SamplingParams
from serve.bridge import Bridge
from serve.calls import Calls
from serve.ended_request import Observer

INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread: beyond this it takes longer than the hop, and the loop serves others."""
WORD_CHARS = 8
"""What it adds to call the tokenizer for a bad word: 600 calls for short ones take 3.8 ms."""
GRAMMAR_THREADS = 64
"""Requests that may wait for their grammars at once. In threads of their own: a hostile grammar takes seconds, and
meanwhile other requests need those that tokenise.
"""


class ServedCore:
    """Refuses with EngineClosed until `attach` and after `refuse_new`. Lives on one event loop.

    calls: those of every service that uses this core. observers: see `Calls`.
    """

    def __init__(self, observers: tuple[Observer, ...] = ()):
        self.calls = Calls(observers)
        self._core: Core | None = None
        self._bridge: Bridge | None = None
        self._suspended: str | None = None
        self._refusal = "the model is still loading; wait until the health service says SERVING"
        self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, "jaxinfer-grammar-wait")

    def attach(self, core: Core) -> None:
        """Begins to serve `core`."""
        self._core = core
        self._bridge = Bridge(core.engine, asyncio.get_running_loop())

    def suspend(self, reason: str | None) -> None:
        """Takes no calls until `suspend(None)`; those that run go on."""
        self._suspended = reason

    @property
    def takes_calls(self) -> bool:
        return self._core is not None and self._suspended is None

    def refuse_new(self, reason: str) -> None:
        """Takes no more calls; those that run go on."""
        self._core = None
        self._refusal = reason

    def fail_running(self, reason: str) -> None:
        """Ends all running requests with UNAVAILABLE."""
        if self._bridge is not None:
            self._bridge.fail_all(EngineClosed(reason))

    def close(self) -> None:
        """Once the engine is closed."""
        self._grammar_threads.shutdown(wait=False, cancel_futures=True)
        if self._bridge is not None:
            self._bridge.close()

    def serving(self) -> tuple[Core, Bridge]:
        """The core and the way to its engine. Raises EngineClosed."""
        if self._core is None or self._bridge is None:
            raise EngineClosed(self._refusal)
        if self._suspended is not None:
            raise EngineClosed(self._suspended)
        return self._core, self._bridge

    def is_full(self) -> Overloaded | None:
        """Why nothing more can wait. What else may be wrong, the calls themselves find out and say."""
        try:
            if self._core is not None and self._suspended is None:
                self._core.engine.check_room(1)
        except Overloaded as error:
            return error
        except Exception:  # the call will meet it too
            return None
        return None

    async def request(self, prompt: Any, params: SamplingParams, *, request_id: str | None, priority: int = 0,
                      cache_salt: str = "") -> Request:
        """A validated request. Raises EngineClosed, InvalidRequest, TokenizerMissing or Overloaded."""
        fault_point("receive", request_id or "")
        make = functools.partial(self.serving()[0].intake.request, prompt, params, request_id=request_id,
                                 priority=priority, cache_salt=cache_salt)
        if params.structured_outputs is not None:
            return await asyncio.get_running_loop().run_in_executor(self._grammar_threads, make)
        return await offloaded(work_size(prompt, params), make)


def work_size(prompt: Any, params: SamplingParams) -> int:
    """Of making a request, in characters of text to tokenise."""
    # Chat templates run in a child process, which takes about a millisecond whatever their size.
    is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    size = INLINE_CHARS + 1 if is_chat else len(prompt)
    rules = (params.allowed_token_ids, params.banned_token_ids, params.logit_bias)
    words = sum(2 * (len(word) + WORD_CHARS) for word in params.bad_words or ())  # each in two spellings
    return size + sum(len(one) for one in rules if one is not None) + words


async def offloaded[**P, R](size: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`work(...)`, in a thread if the input is large."""
    if size <= INLINE_CHARS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


def needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise TokenizerMissing("the model folder has no tokenizer; use token ids")
    return tokenizer
