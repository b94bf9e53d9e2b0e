"""`jaxinfer.v1.DraftService` over a `Core`: its model proposes tokens for sequences of an engine elsewhere.

Each sequence has one request in the engine at most, whose prompt is the sequence; the prefix cache makes that cheap. It
goes on while the accepted tokens are those that it has said, and is cancelled where they are not. It is greedy; where
distributions are asked for it samples at the sequence's temperature between few candidates, whose probabilities are
told with each token.
Everything here runs on the event loop. A stream never ends by itself, so a server that stops does not wait for it.
"""

import asyncio
import logging
import math
import random
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from jaxinfer.core import Core
from jaxinfer.draft_distributions import of_top
from jaxinfer.errors import JaxInferError
from jaxinfer.intake import Prompt
from jaxinfer.protos.v1 import draft_pb2 as pb
from jaxinfer.protos.v1 import draft_pb2_grpc as pb_grpc
from jaxinfer.types import MAX_CANDIDATES, SamplingParams, TokenChunk, TokenLogprobs
from serve.bridge import Bridge, Stream

log = logging.getLogger(__name__)

DRAFT_SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["DraftService"].full_name
MOST_WANTED = 64
"""Proposals that are kept ahead of a sequence."""
MOST_SEQUENCES = 1024
"""Of a stream; others get no proposals."""
MOST_TOKENS = 2**22
"""Of the sequences of all streams, 4 bytes each: what does not fit is forgotten and gets no proposals. A stream lasts
as long as its caller wants, so nothing else bounds what it leaves here.
"""
LEAST_TEMPERATURE = 0.05
"""Below it the rounding of log-probabilities shows in probabilities, and sampling is hardly of use: so the likeliest
tokens are proposed.
"""

SEEDS = random.SystemRandom()
"""What verifies a sampled token must be independent of it. Seeds of other requests follow from a number, on both sides
from the same one by default: equal seeds are equal noise.
"""

Context = grpc.aio.ServicerContext


class Drafting:
    """Proposals for one sequence. say: called when there are new ones."""

    def __init__(self, core: Core, bridge: Bridge, request: pb.DraftRequest, say: Callable[[], None]):
        self._core = core
        self._bridge = bridge
        self._num_wanted = min(max(request.num_wanted, 1), MOST_WANTED)
        self._scored = request.with_probabilities
        self._temperature = request.temperature
        self._salt = request.cache_salt
        sampled = not request.temperature < LEAST_TEMPERATURE
        most = min(MAX_CANDIDATES, core.intake.limits.request.max_logprobs - 1)
        self._num_candidates = max(min(request.num_candidates, most), 0) if sampled else 0
        self._say = say
        self._tokens = array("i")
        self._first = 0  # position of the first of the guesses
        self._guesses: list[int] = []
        self._chances: list[float] = []  # of each guess, where they are wanted
        self._drawn: list[tuple[list[int], list[float]]] = []  # what each was sampled from, likewise
        self._stream: Stream | None = None

    @property
    def num_tokens(self) -> int:
        """That were accepted, and are kept."""
        return len(self._tokens)

    def accept(self, position: int, tokens: Sequence[int]) -> bool:
        """Takes in more tokens; False where they do not fit behind those so far."""
        if position != len(self._tokens) or position + len(tokens) > self._core.info.max_model_len:
            return False
        self._tokens.extend(tokens)
        if not self._agrees():
            self.stop()
            self._forget(len(self._guesses))
        if self._stream is None or self._stream.ended:
            self._guess_more()
        return True

    def _agrees(self) -> bool:
        """Whether the guesses are worth going on with: they are what was accepted, and not far behind it."""
        known = self._tokens[self._first:].tolist()
        behind = len(known) - len(self._guesses)
        going = self._stream is not None and not self._stream.ended
        return self._guesses[:len(known)] == known[:len(self._guesses)] and behind <= going * self._num_wanted // 2

    @property
    def _num_passed(self) -> int:
        """Guesses that have been accepted."""
        return len(self._tokens) - self._first

    def _forget(self, count: int) -> None:
        """The first so many guesses lie behind; those that are left continue the tokens."""
        del self._guesses[:count], self._chances[:count], self._drawn[:count]
        self._first = len(self._tokens)

    def _guess_more(self) -> None:
        """Submits a request for as many as are missing, once half of them are."""
        self._forget(self._num_passed)
        prompt = [*self._tokens, *self._guesses]
        count = min(self._num_wanted - len(self._guesses), self._core.info.max_model_len - len(prompt))
        if 2 * len(self._guesses) > self._num_wanted or count < 1:
            return
        try:
            request = self._core.intake.request(Prompt(tuple(prompt)), self._params(count), cache_salt=self._salt,
                                                seeds=SEEDS)  # fmt: skip
            self._stream = self._bridge.open(request, self._consume)
        except JaxInferError:  # what the model or the engine does not take, a full queue: no proposals for now
            self._stream = None

    def _params(self, count: int) -> SamplingParams:
        """One log-probability more than candidates shows whether the last of them is tied with others."""
        if not self._num_candidates:
            return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False,
                                  logprobs=0 if self._scored else None)  # fmt: skip
        return SamplingParams(max_tokens=count, temperature=self._temperature, top_k=self._num_candidates,
                              ignore_eos=True, detokenize=False, logprobs=self._num_candidates + 1)  # fmt: skip

    def _consume(self, chunk: TokenChunk) -> bool:
        scores: Sequence[TokenLogprobs] = chunk.logprobs or ()
        self._guesses += chunk.token_ids
        if self._scored:
            self._chances += [math.exp(one.logprob) for one in scores]
        if self._num_candidates:
            self._drawn += [of_top(one.top, self._temperature, self._num_candidates) for one in scores]
        self._say()
        return False

    def response(self, name: int) -> pb.DraftResponse | None:
        """The guesses behind the accepted tokens; None where there are none, or they went elsewhere."""
        passed = self._num_passed
        ahead = self._guesses[passed:]
        if not ahead or self._guesses[:passed] != self._tokens[self._first:].tolist():
            return None
        found = pb.DraftResponse(sequence=name, position=len(self._tokens), token_ids=ahead,
                                 probabilities=self._chances[passed:])
        if self._num_candidates:
            found.num_candidates = self._num_candidates
            for ids, chances in self._drawn[passed:]:
                found.candidate_ids.extend(ids)
                found.candidate_probabilities.extend(chances)
        return found

    def stop(self) -> None:
        """Cancels what runs for it."""
        if self._stream is not None:
            self._stream.cancel()


class Exchange:
    """The sequences of one stream, and those with new proposals. held: tokens of all streams, counted by "tokens"."""

    def __init__(self, core: Core, bridge: Bridge, held: Counter[str]):
        self._core = core
        self._held = held
        self._bridge = bridge
        self._draftings: dict[int, Drafting] = {}
        self._news: dict[int, None] = {}
        self._wake = asyncio.Event()
        self._closed = False

    async def read(self, requests: AsyncIterator[pb.DraftRequest]) -> None:
        """Until the caller sends no more."""
        try:
            async for request in requests:
                self._take_in(request)
        finally:
            self.close()

    def _take_in(self, request: pb.DraftRequest) -> None:
        """A sequence that ended, or whose tokens do not fit, is forgotten; one begins at position 0."""
        name = request.sequence
        if request.ended or (request.position == 0 and name in self._draftings):
            self._drop(name)
        if request.ended or self._closed:
            return
        drafting = self._draftings.get(name)
        if drafting is None and request.position == 0 and len(self._draftings) < MOST_SEQUENCES:
            drafting = self._draftings[name] = Drafting(self._core, self._bridge, request, lambda: self._say(name))
        if drafting is None:
            return
        count = len(request.token_ids)
        if self._held["tokens"] + count > MOST_TOKENS or not drafting.accept(request.position, request.token_ids):
            self._drop(name)
        else:
            self._held["tokens"] += count

    def _say(self, name: int) -> None:
        self._news[name] = None
        self._wake.set()

    def _drop(self, name: int) -> None:
        drafting = self._draftings.pop(name, None)
        if drafting is not None:
            self._held["tokens"] -= drafting.num_tokens
            drafting.stop()

    async def wait(self) -> bool:
        """Waits for proposals; False once closed."""
        await self._wake.wait()
        if not self._closed:
            self._wake.clear()
        return not self._closed

    def responses(self) -> list[pb.DraftResponse]:
        """What is new: a slow reader gets the newest only."""
        names, self._news = self._news, {}
        found = (self._draftings[name].response(name) for name in names if name in self._draftings)
        return [one for one in found if one is not None]

    def close(self) -> None:
        """Cancels everything that runs."""
        self._closed = True
        self._wake.set()
        for name in list(self._draftings):
            self._drop(name)


class DraftService(pb_grpc.DraftServiceServicer):
    """Refuses calls with UNAVAILABLE until `attach` and after `end`. Lives on one event loop."""

    def __init__(self):
        self._core: Core | None = None
        self._bridge: Bridge | None = None
        self._exchanges: set[Exchange] = set()
        self._held: Counter[str] = Counter()

    def attach(self, core: Core) -> None:
        """Begins to draft with `core`."""
        self._core = core
        self._bridge = Bridge(core.engine, asyncio.get_running_loop())

    def end(self) -> None:
        """Takes no more calls and ends those that run: whoever calls can do without."""
        self._core = None
        for exchange in self._exchanges:
            exchange.close()

    def close(self) -> None:
        """Once the engine is closed."""
        if self._bridge is not None:
            self._bridge.close()

    async def Draft(self, requests: AsyncIterator[pb.DraftRequest], context: Context
                    ) -> AsyncIterator[pb.DraftResponse]:  # fmt: skip
        if self._core is None or self._bridge is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the model is loading or the server is stopping")
        exchange = Exchange(self._core, self._bridge, self._held)
        self._exchanges.add(exchange)
        reading = asyncio.create_task(exchange.read(requests))
        try:
            while await exchange.wait():
                for response in exchange.responses():
                    yield response
        finally:
            exchange.close()
            self._exchanges.discard(exchange)
            reading.cancel()
            (error,) = await asyncio.gather(reading, return_exceptions=True)
            if isinstance(error, Exception) and not isinstance(error, grpc.aio.BaseError):  # that is the caller's
                log.error("a stream of drafts failed", exc_info=error)
