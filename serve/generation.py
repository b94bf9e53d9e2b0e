"""One request on its way: the engine's chunks in, users' deltas out, and what it all cost."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Protocol

from jaxinfer.assembly import Assembler
from jaxinfer.outputs import Delta, PositionLogprobs, RequestOutput
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import Request, RequestStats, TokenChunk
from serve.bridge import Bridge, Stream


class Generation:
    """Makes deltas of a request's chunks and keeps count. streams: deltas are all that is wanted, not `output`."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, *, streams: bool = False):
        self.request = request
        self.has_text = tokenizer is not None and request.params.detokenize
        self._assembler = Assembler(request, tokenizer, keeps_output=not streams)
        self._num_unfinished = request.params.n
        self.num_output_tokens = 0
        self._first_seen = 0.0
        self.finish_reasons: Counter[str] = Counter()
        """Of the samples that have ended."""
        self.num_cached_tokens = 0
        """Of the prompt, known with the first tokens."""

    def feed(self, chunk: TokenChunk) -> Delta | None:
        """What a chunk adds; None if nothing that a user would see."""
        if chunk.stats is not None:
            self.num_cached_tokens = max(self.num_cached_tokens, chunk.stats.num_cached_tokens)
        delta = self._assembler.feed(chunk)
        if delta is None or not (delta.token_ids or delta.text or delta.finish_reason):
            return None
        if not self.num_output_tokens:
            self._first_seen = time.monotonic()
        self.num_output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
            self.finish_reasons[delta.finish_reason] += 1
        return delta

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return not self._num_unfinished

    def output(self) -> RequestOutput:
        """Everything so far, unless it streams."""
        return self._assembler.output()

    def prompt_logprobs(self) -> list[PositionLogprobs | None]:
        """Those of the prompt, of a stream only once; [] if they were not asked for."""
        return self._assembler.take_prompt_logprobs()

    def engine_stats(self) -> RequestStats:
        """What the engine has told so far; to be read only."""
        return self._assembler.stats() or RequestStats(arrival=self.request.arrival)

    def stats(self) -> RequestStats:
        """Of all samples together, at the end."""
        stats = self.engine_stats()
        stats.num_prompt_tokens = len(self.request.prompt)
        stats.num_output_tokens = self.num_output_tokens
        stats.first_token = stats.first_token or self._first_seen
        stats.finished = stats.finished or time.monotonic()
        return stats


class Outbox(Protocol):
    """Where a service keeps what it has not sent yet."""

    @property
    def messages(self) -> Collection[object]: ...

    def add(self, delta: Delta) -> None: ...

    def add_prompt_logprobs(self, found: Sequence[PositionLogprobs | None]) -> None: ...

    def close(self, stats: RequestStats) -> None:
        """After the last delta."""
        ...


def open_collected(bridge: Bridge, request: Request, generation: Generation) -> Stream:
    """Runs a request whose answer is read once, at the end: nothing wakes the reader before."""
    def consume(chunk: TokenChunk) -> bool:
        delta = generation.feed(chunk)
        if delta is not None and delta.cancel_row:
            stream.cancel_sample(delta.index)
        return False

    stream = bridge.open(request, consume)
    return stream


def open_streamed(bridge: Bridge, request: Request, generation: Generation, outbox: Outbox) -> Stream:
    """Runs a request whose deltas go to `outbox`."""
    def consume(chunk: TokenChunk) -> bool:
        delta = generation.feed(chunk)
        if chunk.prompt_logprobs is not None:
            outbox.add_prompt_logprobs(generation.prompt_logprobs())
        if delta is not None:
            outbox.add(delta)
            if delta.finish_reason is not None:
                if delta.cancel_row:
                    stream.cancel_sample(delta.index)
                if generation.finished:
                    outbox.close(generation.stats())
        return bool(outbox.messages)

    stream = bridge.open(request, consume)
    return stream
