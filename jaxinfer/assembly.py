"""TokenChunks to text: incremental decoding, stop strings, and the outputs users see.

One Assembler serves one request and belongs to one consumer; it is not thread-safe. What it produces does
not depend on how the engine cut the token stream into chunks.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from jaxinfer.outputs import CompletionOutput, Delta, Logprob, PositionLogprobs, RequestOutput
from jaxinfer.tokenizer import BytesDecoder, Tokenizer, WindowDecoder
from jaxinfer.types import Request, RequestStats, TokenChunk, TokenLogprobs
from jaxinfer.validation import stop_strings


class StopSearch:
    """Finds the first stop string to be completed in a text given piece by piece, O(stops) a character.

    Each stop is followed by its own Knuth-Morris-Pratt state: how many of its characters the text ends with.
    So the verdict is the same however the text is cut, and the largest state is exactly how much of the text
    may still become part of a match.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._firsts = {stop[0] for stop in stops}
        self._failures = [_failures(stop) for stop in stops]
        self._states = [0] * len(stops)

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max(self._states, default=0)

    def feed(self, piece: str, counts: bool = True) -> tuple[int, str] | None:
        """Reads on. A match gives (characters of `piece` up to its end, the stop); ties go to the longest.

        counts: whether matches that end in this piece count.
        """
        if self._firsts.isdisjoint(piece) and not any(self._states):
            return None  # nothing has begun, and nothing begins here
        for position, char in enumerate(piece, start=1):
            matches = [stop for i, stop in enumerate(self._stops) if self._advance(i, char)]
            if matches and counts:
                return position, max(matches, key=len)
        return None

    def _advance(self, i: int, char: str) -> bool:
        stop, failures, state = self._stops[i], self._failures[i], self._states[i]
        while state and stop[state] != char:
            state = failures[state - 1]
        state += stop[state] == char
        matched = state == len(stop)
        self._states[i] = failures[state - 1] if matched else state
        return matched


def _failures(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper suffix that is again a prefix."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        length += stop[i] == stop[length]
        table[i] = length
    return table


class _Sample:
    """One of a request's n samples: its tokens, its released text and the text held back."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None, keeps_output: bool):
        params = request.params
        self.out = CompletionOutput(index)
        self._keeps_output = keeps_output
        self._num_forgotten = 0  # tokens that are in no output any more
        self._request = request
        self._tokenizer = tokenizer
        self._decoder: BytesDecoder | WindowDecoder | None = None
        if tokenizer is not None and params.detokenize:
            self._decoder = tokenizer.incremental(params.skip_special_tokens)
        self._stops = StopSearch(stop_strings(params) if self._decoder else ())
        self._keep_stop = params.include_stop_str_in_output
        self._pieces: list[str] = []
        self._held = ""
        self.matched: str | None = None
        self.matched_at = 0.0  # time.monotonic() seconds
        self._is_plain = params.logprobs is None and not (self._decoder and stop_strings(params))
        if params.logprobs is not None:
            self.out.logprobs, self.out.cumulative_logprob = [], 0.0

    def feed(self, chunk: TokenChunk) -> Delta:
        """Takes a chunk's tokens one by one, so that chunk borders cannot matter."""
        if self._is_plain and chunk.finish_reason is None:
            return self._feed_plain(chunk.token_ids)
        if not self._keeps_output:
            self._forget()
        num_before, num_pieces = len(self.out.token_ids), len(self._pieces)
        logprobs = chunk.logprobs or [None] * len(chunk.token_ids)
        for id, logprob in zip(chunk.token_ids, logprobs, strict=True):
            self._take(id, logprob)
            if self.matched is not None:
                break
        if chunk.finish_reason is not None and self.matched is None:
            self._read(self._flush())
        return self._delta(chunk, num_before, num_pieces)

    def _feed_plain(self, ids: list[int]) -> Delta:
        """Tokens that can only add text, all at once: no stop strings, no log-probabilities, and not the end, where a
        stop id may be among them."""
        piece = "" if self._decoder is None else self._decoder.feed(ids)
        if self._keeps_output:
            self.out.token_ids += ids
            self._release(piece)
        else:
            self._num_forgotten += len(ids)
        return Delta(self._request.id, self.out.index, piece, ids)

    def _forget(self) -> None:
        """What earlier deltas have told."""
        out = self.out
        self._num_forgotten += len(out.token_ids)
        out.token_ids, self._pieces = [], []
        if out.logprobs is not None:
            out.logprobs = []

    @property
    def num_tokens(self) -> int:
        return self._num_forgotten + len(self.out.token_ids)

    @property
    def text(self) -> str:
        """The released text."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return "".join(self._pieces)

    def _take(self, id: int, logprob: TokenLogprobs | None) -> None:
        if id in self._request.stop_ids:  # its text is not output; what came before it is now certain
            self._read(self._flush())
            if self.matched is not None:
                return
        self.out.token_ids.append(id)
        self._note_logprob(logprob)
        if self._decoder is not None and (self._keep_stop or id not in self._request.stop_ids):
            self._read(self._decoder.feed((id,)))

    def _note_logprob(self, logprob: TokenLogprobs | None) -> None:
        if self.out.logprobs is None or logprob is None:
            return
        count = self._request.params.logprobs
        self.out.logprobs.append(position_logprobs(logprob, self._tokenizer, count))
        self.out.cumulative_logprob = (self.out.cumulative_logprob or 0.0) + logprob.logprob

    def _flush(self) -> str:
        return self._decoder.flush() if self._decoder else ""

    def _read(self, piece: str) -> None:
        """Adds decoded text: looks for stops, releases what cannot be part of one."""
        if not piece:
            return
        # As in vLLM, only text of tokens after the first min_tokens can end the output.
        counts = self.num_tokens > self._request.params.min_tokens
        match = self._stops.feed(piece, counts)
        text = self._held + piece
        if match is not None:
            position, self.matched = match
            self.matched_at = time.monotonic()
            end = len(self._held) + position
            self._release(text[:end if self._keep_stop else end - len(self.matched)])
            return
        certain = len(text) - (0 if self._keep_stop else self._stops.num_held)
        self._release(text[:certain])
        self._held = text[certain:]

    def _release(self, text: str) -> None:
        self._held = ""
        if text:
            self._pieces.append(text)

    def _delta(self, chunk: TokenChunk, num_before: int, num_pieces: int) -> Delta:
        out = self.out
        if self.matched is not None:
            out.finish_reason, out.stop_reason = "stop", self.matched
        elif chunk.finish_reason is not None:
            self._release(self._held)
            out.finish_reason, out.stop_reason = chunk.finish_reason, chunk.stop_reason
        return Delta(
            self._request.id, out.index,
            text="".join(self._pieces[num_pieces:]),
            token_ids=out.token_ids[num_before:],
            logprobs=None if out.logprobs is None else out.logprobs[num_before:],
            finish_reason=out.finish_reason,
            stop_reason=out.stop_reason,
            cancel_row=self.matched is not None and chunk.finish_reason is None,
            error=chunk.error,
        )


class Assembler:
    """Collects the chunks of one request. prompt_text: the text the prompt came from, if it was text.

    keeps_output: False where the deltas are all that is wanted: then only the newest is kept of text, tokens and
    log-probabilities, of which there may be kilobytes a token, and `output` has no more of them.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, prompt_text: str | None = None, *,
                 keeps_output: bool = True):
        self.request = request
        self._tokenizer = tokenizer
        self._prompt_text = prompt_text
        self._keeps_output = keeps_output
        self._samples = [_Sample(request, index, tokenizer, keeps_output) for index in range(request.params.n)]
        self._prompt_logprobs: list[PositionLogprobs] = []
        self._prompt_source: int | None = None
        self._stats: dict[int, RequestStats] = {}

    def feed(self, chunk: TokenChunk) -> Delta | None:
        """What the chunk adds; None for a chunk of a sample that has ended (a cancelled row's last steps)."""
        if chunk.stats is not None:
            self._stats[chunk.index] = chunk.stats
        if chunk.prompt_logprobs:
            self._note_prompt_logprobs(chunk)
        sample = self._samples[chunk.index]
        return None if sample.out.finished else sample.feed(chunk)

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.out.finished for sample in self._samples)

    def output(self) -> RequestOutput:
        """Everything so far that was kept. The object is the caller's: later chunks do not change it."""
        return RequestOutput(
            self.request.id, self._prompt_text, list(self.request.prompt), self._prompt_output(),
            [_snapshot(sample) for sample in self._samples], self.finished, self.stats())

    def take_prompt_logprobs(self) -> list[PositionLogprobs | None]:
        """Those of the prompt, one entry a token, once they are there; [] if they were not asked for."""
        found = self._prompt_output() or []
        if not self._keeps_output:
            self._prompt_logprobs = []
        return found

    def stats(self) -> RequestStats | None:
        """Of all samples together. One that a stop string ended is reported by its text: its row may have gone on."""
        reports = []
        for index, report in self._stats.items():
            sample = self._samples[index]
            if sample.matched is not None:
                report = replace(report, finished=sample.matched_at, num_output_tokens=sample.num_tokens)
            reports.append(report)
        return joined_stats(reports)

    def _note_prompt_logprobs(self, chunk: TokenChunk) -> None:
        """Keeps one sample's report: with n samples each may compute the prompt, all with the same result."""
        if not chunk.prompt_logprobs or self._prompt_source not in (None, chunk.index):
            return
        self._prompt_source = chunk.index
        room = len(self.request.prompt) - 1 - len(self._prompt_logprobs)
        count = self.request.params.prompt_logprobs
        self._prompt_logprobs += [position_logprobs(one, self._tokenizer, count)
                                  for one in chunk.prompt_logprobs[:room]]

    def _prompt_output(self) -> list[PositionLogprobs | None] | None:
        return None if self.request.params.prompt_logprobs is None else [None, *self._prompt_logprobs]


def position_logprobs(logprobs: TokenLogprobs, tokenizer: Tokenizer | None,
                      count: int | None = None) -> PositionLogprobs:
    """vLLM's form: the chosen token first, then at most `count` alternatives in order of likelihood."""
    def text(id: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(id)

    found = {logprobs.token_id: Logprob(logprobs.logprob, logprobs.rank, text(logprobs.token_id))}
    for rank, (id, logprob) in enumerate(logprobs.top[:count], start=1):
        found.setdefault(id, Logprob(logprob, rank, text(id)))
    return found


def cancelled(deltas: Iterable[Delta | None]) -> list[int]:
    """Indices of the samples whose rows the receiver must cancel."""
    return [delta.index for delta in deltas if delta is not None and delta.cancel_row]


def joined_stats(samples: Iterable[RequestStats]) -> RequestStats | None:
    """One report for a request's samples: from the first that began to the last that ended; counts of the
    outputs and preemptions add up. None when no sample has reported.
    """
    reports = list(samples)
    if not reports:
        return None
    return RequestStats(
        arrival=min(one.arrival for one in reports),
        scheduled=min((one.scheduled for one in reports if one.scheduled), default=0.0),
        first_token=min((one.first_token for one in reports if one.first_token), default=0.0),
        finished=max(one.finished for one in reports),
        num_prompt_tokens=max(one.num_prompt_tokens for one in reports),
        num_output_tokens=sum(one.num_output_tokens for one in reports),
        num_cached_tokens=max(one.num_cached_tokens for one in reports),
        num_preemptions=sum(one.num_preemptions for one in reports))


def _snapshot(sample: _Sample) -> CompletionOutput:
    out = sample.out
    return CompletionOutput(out.index, sample.text, list(out.token_ids), out.cumulative_logprob,
                            None if out.logprobs is None else list(out.logprobs), out.finish_reason, out.stop_reason)
