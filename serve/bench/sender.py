"""One request over gRPC: sent, read to its end, timed. Nothing is tried twice."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from jaxinfer.errors import InvalidConfig
from serve.bench.config import BenchConfig
from serve.bench.connection import Connections
from serve.bench.dataset import Sample
from serve.bench.record import OK, Record
from serve.client import Envelope, request_message
from serve.protos.jaxinfer.v1 import generation_pb2 as pb

SAMPLING = ("temperature", "top_p", "top_k")


def messages(config: BenchConfig, samples: Sequence[Sample], lengths: Sequence[int]) -> list[pb.GenerateRequest]:
    """All requests, made before the first is due. Raises InvalidConfig."""
    chosen: dict[str, Any] = {name: getattr(config, name) for name in SAMPLING}
    chosen["ignore_eos"] = config.dataset == "random" if config.ignore_eos is None else config.ignore_eos
    # Equal seeds make equal prompts: without a salt a second run would find those of the first in the server's cache.
    salt = config.cache_salt or f"bench-{secrets.token_hex(8)}"
    found = []
    for number, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        options = Envelope(**chosen, max_tokens=length, request_id=f"bench-{number}", cache_salt=salt)
        try:
            found.append(request_message(sample.prompt, options))
        except (TypeError, ValueError) as error:  # no such token id, or text with half a character
            raise InvalidConfig("dataset_path", f"a prompt cannot be sent: {error}") from None
    return found


class Sender:
    """Fills records. timeout: deadline of a request in seconds. keep_text: what is generated is kept, too. on_end: told
    of each request that has ended.
    """

    def __init__(self, connections: Connections, requests: Sequence[pb.GenerateRequest], timeout: float | None, *,
                 keep_text: bool = False, on_end: Callable[[Record], None] = lambda record: None):
        self._connections = connections
        self._requests = requests
        self._timeout = timeout
        self._keep_text = keep_text
        self._on_end = on_end

    async def send(self, number: int, record: Record, clock: Callable[[], float]) -> None:
        place = self._connections.acquire()
        record.sent = clock()
        try:
            async for message in self._connections.stub(place).GenerateStream(
                    self._requests[number], timeout=self._timeout):
                self._note(message, record, clock())
        except grpc.aio.AioRpcError as error:
            record.ended = clock()
            record.status, record.error = error.code().name, error.details() or ""
        finally:
            self._connections.release(place)
        self._judge(record)
        self._on_end(record)

    def _note(self, message: pb.GenerateStreamResponse, record: Record, now: float) -> None:
        count = 0
        for delta in message.deltas:
            count += len(delta.token_ids)
            if self._keep_text:
                record.text += delta.text
            if delta.finish_reason == pb.FINISH_REASON_ABORT:
                record.status, record.error = "ABORTED", "the server's operator ended the output"
        if count:
            record.times.append(now)
            record.counts.append(count)
        record.ended = now
        if message.HasField("usage"):
            read_end(message, record)

    def _judge(self, record: Record) -> None:
        if record.status != "UNKNOWN" or record.error:
            return
        if record.output_tokens and record.times:
            record.status = OK
        else:
            record.error = "the stream ended without tokens or without its end"


def read_end(message: pb.GenerateStreamResponse, record: Record) -> None:
    """What the last message of a stream brings."""
    usage, timings = message.usage, message.timings
    record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.output_tokens
    record.cached_tokens = usage.cached_tokens
    record.server_ttft = timings.ttft if timings.HasField("ttft") else None
    record.server_queue = timings.queue if timings.HasField("queue") else None
