"""A core one can do in the head: the engine's next token is last + 1, and token ids are bytes of text."""

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfer.chat_template import ChatTemplate
from jaxinfer.core import Consumer, Core, Load, ModelInfo
from jaxinfer.errors import EngineClosed, Overloaded, StepFailed
from jaxinfer.intake import GenerationDefaults, Intake
from jaxinfer.metrics import Metrics
from jaxinfer.tokenizer import BYTE_OF_CHAR, Tokenizer
from jaxinfer.types import Request, RequestStats, SamplingParams, StepKind, StepPlan, TokenChunk, TokenLogprobs
from jaxinfer.validation import Limits

EOS = 256
VOCAB_SIZE = 257
DECODE = cast(StepPlan, SimpleNamespace(kind=StepKind.DECODE, num_rounds=1, num_drafted=(), slots=(), tokens=()))
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@dataclass(slots=True)
class Row:
    request: Request
    index: int
    consumer: Consumer
    last: int
    left: int
    stats: RequestStats = field(default_factory=RequestStats)


class CountingEngine:
    """An EngineHandle. Without `pace` a test calls `step`; with it a thread steps every `pace` seconds.

    cancelled: what was cancelled while it ran, as (id without the bridge's number, index).
    """

    def __init__(self, *, tokens_per_step: int = 1, pace: float | None = None, max_waiting: int = 1000):
        self.rows: dict[tuple[str, int], Row] = {}
        self.cancelled: list[tuple[str, int | None]] = []
        self.num_steps = 0
        self.tokens_per_step = tokens_per_step
        self.submit_error: Exception | None = None
        self.alive = True
        self.closed = False
        self.paused = False
        self._max_waiting = max_waiting
        self._pace = pace
        self._counted = Metrics(self.load)
        self._lock = threading.RLock()
        if pace is not None:
            threading.Thread(target=self._run, daemon=True).start()

    def check_room(self, num_samples: int) -> None:
        if self.submit_error is not None:
            raise self.submit_error
        if self.closed:
            raise EngineClosed("the engine is closed")
        if len(self.rows) >= self._max_waiting:
            raise Overloaded(f"{len(self.rows)} requests are waiting, the limit is {self._max_waiting}; try later")

    def submit(self, request: Request, consumer: Consumer) -> None:
        with self._lock:
            self.check_room(request.params.n)
            for index in range(request.params.n):
                row = self.rows[request.id, index] = new_row(request, index, consumer)
                self._counted.record_start(row.stats)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        with self._lock:
            found = [key for key in self.rows if key[0] == request_id and index in (None, key[1])]
            for key in found:
                self._count_end(self.rows.pop(key), "abort" if index is None else "stop")
            if found:
                self.cancelled.append((request_id.rpartition("/")[0], index))

    def step(self) -> None:
        """All rows go on by `tokens_per_step`; one `deliver` a consumer."""
        with self._lock:
            self.num_steps += 1
            parcels: dict[int, tuple[Consumer, list[TokenChunk]]] = {}
            began = time.monotonic()
            for row in list(self.rows.values()):
                parcels.setdefault(id(row.consumer), (row.consumer, []))[1].append(self._advance(row))
            num_tokens = sum(len(one.token_ids) for _, chunks in parcels.values() for one in chunks)
            self._counted.record_step(DECODE, num_tokens, time.monotonic())
            self._counted.record_times(time.monotonic() - began, 0.0)
        for consumer, chunks in parcels.values():
            consumer.deliver(chunks)

    def fail(self, error: Exception) -> None:
        """What EngineThread does when it gives up."""
        with self._lock:
            rows, self.rows = list(self.rows.values()), {}
        for row in rows:
            row.consumer.deliver([TokenChunk(row.request.id, row.index, [], finish_reason="error", error=error)])

    def die(self) -> None:
        """As the engine's thread after steps that failed again and again."""
        self.fail(StepFailed("3 device steps failed"))
        self.close()

    def progress(self) -> int | None:
        return self.num_steps if self.rows else None

    def load(self) -> Load:
        return Load(len(self.rows), 0, 0, 3, 2, 64)

    def metrics(self) -> dict[str, Any]:
        return self._counted.snapshot() | {"compiles_after_ready": 0, "pages_free": 59}

    def run(self, work: Any) -> Any:
        return work(self)

    def close(self, drain_seconds: float = 0.0) -> None:
        self.closed = True
        self.alive = False

    def _advance(self, row: Row) -> TokenChunk:
        ids: list[int] = []
        while row.left and len(ids) < self.tokens_per_step:
            row.left -= 1
            row.last = (row.last + 1) % VOCAB_SIZE
            ids.append(row.last)
            if row.last in row.request.stop_ids:
                break
        chunk = TokenChunk(row.request.id, row.index, ids, logprobs=self._logprobs(row, ids))
        self._note_first(row, chunk)
        if not row.left or row.last in row.request.stop_ids:
            chunk.finish_reason = "stop" if row.last in row.request.stop_ids else "length"
            if row.last != EOS and chunk.finish_reason == "stop":
                chunk.stop_reason = row.last
            chunk.stats = row.stats
            self._count_end(self.rows.pop((row.request.id, row.index)), chunk.finish_reason)
        return chunk

    def _count_end(self, row: Row, reason: str) -> None:
        row.stats.finished = time.monotonic()
        row.stats.num_output_tokens = row.request.max_tokens - row.left
        self._counted.record_end(reason, row.stats)

    def _note_first(self, row: Row, chunk: TokenChunk) -> None:
        if row.stats.first_token:
            return
        row.stats.first_token = time.monotonic()
        self._counted.record_first_token(row.stats)
        chunk.stats = row.stats
        number = row.request.params.prompt_logprobs
        if number is not None and row.index == 0:
            chunk.prompt_logprobs = [logprobs_of(id, number) for id in row.request.prompt[1:]]

    def _logprobs(self, row: Row, ids: list[int]) -> list[TokenLogprobs] | None:
        number = row.request.params.logprobs
        return None if number is None else [logprobs_of(id, number) for id in ids]

    def _run(self) -> None:
        while not self.closed:
            time.sleep(self._pace or 0)
            if not self.paused:
                self.step()


def new_row(request: Request, index: int, consumer: Consumer) -> Row:
    """Half of the prompt counts as cached."""
    stats = RequestStats(arrival=request.arrival, scheduled=time.monotonic(), num_prompt_tokens=len(request.prompt),
                         num_cached_tokens=len(request.prompt) // 2)
    return Row(request, index, consumer, request.prompt[-1], request.max_tokens, stats)


def logprobs_of(id: int, number: int) -> TokenLogprobs:
    """The chosen token has rank 2."""
    top = tuple(((id + 1 + shift) % VOCAB_SIZE, -0.5 - shift) for shift in range(number))
    if number >= 2:
        top = (top[0], (id, -1.5), *top[2:])
    return TokenLogprobs(id, -1.5, 2, top)


def byte_tokenizer() -> Tokenizer:
    """Token id = byte; 256 is end-of-sequence."""
    backend = Backend(models.BPE(vocab=dict(BYTE_OF_CHAR), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer.from_json(backend.to_str(), {"eos_token": "<eos>"})


def write_tokenizer(folder: Path) -> Path:
    """The byte tokenizer as the files of a model folder."""
    (folder / "tokenizer.json").write_text(byte_tokenizer()._backend.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_core(engine: CountingEngine | None = None, *, with_tokenizer: bool = True,
              max_model_len: int = 300_000, folder: Path | None = None) -> Core:
    """folder: where to read the tokenizer from, if it is to have files."""
    tokenizer = None
    if with_tokenizer:
        tokenizer = byte_tokenizer() if folder is None else Tokenizer.from_folder(folder)
    intake = Intake(
        tokenizer, Limits(vocab_size=VOCAB_SIZE, max_model_len=max_model_len),
        GenerationDefaults(SamplingParams(temperature=0.7, max_tokens=5), (EOS,)),
        chat_template=ChatTemplate(TEMPLATE) if with_tokenizer else None)
    info = ModelInfo("counting", "counting", VOCAB_SIZE, max_model_len, "int32", 1, (EOS,), with_tokenizer,
                     has_chat_template=with_tokenizer)
    return Core(info, intake, tokenizer, engine or CountingEngine(pace=0.001))
