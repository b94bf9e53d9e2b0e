"""What is read off a stream, message by message."""

import asyncio
from typing import Any

from serve.bench.record import Record
from serve.bench.sender import Sender
from serve.protos.jaxinfer.v1 import generation_pb2 as pb

REQUEST = pb.GenerateRequest(text="x")


class OneStream:
    """As much of Connections as a sender needs; its server sends what it was given."""

    def __init__(self, *messages: pb.GenerateStreamResponse):
        self.messages = messages
        self.asked: list[Any] = []
        self.running = 0

    def acquire(self) -> int:
        self.running += 1
        return 0

    def release(self, number: int) -> None:
        self.running -= 1

    def stub(self, number: int) -> "OneStream":
        return self

    async def GenerateStream(self, request: pb.GenerateRequest, timeout: float | None):
        self.asked.append((request, timeout))
        for message in self.messages:
            yield message


def delta(*ids: int, text: str = "", **fields: Any) -> pb.GenerateStreamResponse:
    finish = fields.pop("finish_reason", None)
    return pb.GenerateStreamResponse(
        deltas=[pb.Completion(index=0, token_ids=ids, text=text, finish_reason=finish)], **fields)


USAGE = pb.Usage(prompt_tokens=5, output_tokens=4, cached_tokens=2)
TIMINGS = pb.Timings(queue=0.5, ttft=1.5, decode=1, total=3)
END = delta(4, text="d", finish_reason=pb.FINISH_REASON_LENGTH, usage=USAGE, timings=TIMINGS)


def sent(*messages: pb.GenerateStreamResponse, **options: Any) -> Record:
    """The clock goes on by a second each time it is read: 0 when the request is sent, 1 with the first message."""
    stream, record, ticks, ended = OneStream(*messages), Record(0.0), iter(range(99)), []
    sender = Sender(stream, [REQUEST], 7.0, on_end=ended.append, **options)  # type: ignore[arg-type]
    asyncio.run(sender.send(0, record, lambda: float(next(ticks))))
    assert stream.asked == [(REQUEST, 7.0)] and stream.running == 0 and ended == [record]
    return record


def test_every_message_with_tokens_is_timed():
    record = sent(pb.GenerateStreamResponse(request_id="r"), delta(1, text="a"), delta(2, 3, text="bc"), END)
    assert (record.sent, record.times, record.counts, record.ended) == (0.0, [2.0, 3.0, 4.0], [1, 2, 1], 4.0)
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (5, 4, 2)
    assert (record.server_queue, record.server_ttft) == (0.5, 1.5)
    assert record.completed and record.error == "" and record.text == ""


def test_an_end_without_tokens_counts_as_the_end():
    end = delta(finish_reason=pb.FINISH_REASON_STOP, usage=USAGE, timings=pb.Timings(ttft=1))
    record = sent(delta(1, 2, 3, 4), end)
    assert (record.times, record.ended, record.server_queue) == ([1.0], 2.0, None)


def test_text_is_kept_on_request():
    assert sent(delta(1, text="a"), delta(2, 3, text="bc"), END, keep_text=True).text == "abcd"


def test_what_is_no_answer_is_no_success():
    aborted = sent(delta(1), delta(finish_reason=pb.FINISH_REASON_ABORT, usage=USAGE))
    assert (aborted.status, aborted.error) == ("ABORTED", "the server's operator ended the output")
    for messages in ((), (pb.GenerateStreamResponse(usage=USAGE),), (delta(1),)):
        record = sent(*messages)
        assert record.status == "UNKNOWN", messages
        assert record.error == "the stream ended without tokens or without its end"
