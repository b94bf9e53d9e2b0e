"""One request on its way: the engine's chunks in, users' deltas out, and what it all cost."""

import time

from jaxinfer.assembly import Assembler
from jaxinfer.outputs import Delta, PositionLogprobs, RequestOutput
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import Request, RequestStats, TokenChunk


class Generation:
    """Makes deltas of a request's chunks and keeps count."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self.request = request
        self.has_text = tokenizer is not None and request.params.detokenize
        self._assembler = Assembler(request, tokenizer)
        self._num_unfinished = request.params.n
        self._num_output_tokens = 0
        self._first_seen = 0.0

    def feed(self, chunk: TokenChunk) -> Delta | None:
        """What a chunk adds; None if nothing that a user would see."""
        delta = self._assembler.feed(chunk)
        if delta is None or not (delta.token_ids or delta.text or delta.finish_reason):
            return None
        if not self._num_output_tokens:
            self._first_seen = time.monotonic()
        self._num_output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
        return delta

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return not self._num_unfinished

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._assembler.output()

    def prompt_logprobs(self) -> list[PositionLogprobs | None]:
        """Those of the prompt; [] if they were not asked for."""
        return self._assembler.output().prompt_logprobs or []

    def stats(self) -> RequestStats:
        """Of all samples together, at the end."""
        stats = self._assembler.stats() or RequestStats(arrival=self.request.arrival)
        stats.num_prompt_tokens = len(self.request.prompt)
        stats.num_output_tokens = self._num_output_tokens
        stats.first_token = stats.first_token or self._first_seen
        stats.finished = stats.finished or time.monotonic()
        return stats
