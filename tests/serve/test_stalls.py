"""Streams that nobody reads are ended, and nobody else notices."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from counting_engine import VOCAB_SIZE, CountingEngine, make_core
from serving import Served, eventually, serving

from serve.client import Stream
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc

LONG = 100_000
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 64 * 1024), ("grpc.http2.bdp_probe", 0),
                ("grpc.use_local_subchannel_pool", 1))
"""Of a client: what it takes in without being read is kept small, so that it stalls soon."""


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(make_core(CountingEngine(tokens_per_step=20, pace=0.01)), stall_timeout=0.5) as found:
        yield found


class Stalled:
    """A stream of which the first message is read, and no other until `rest`."""

    def __init__(self, served: Served, request_id: str):
        self._channel = grpc.insecure_channel(served.server.address, options=SMALL_WINDOW)
        sampling = pb.SamplingParams(max_tokens=LONG, ignore_eos=True, logprobs=20)
        self._call = pb_grpc.GenerationServiceStub(self._channel).GenerateStream(pb.GenerateRequest(
            text="a", request_id=request_id, sampling=sampling))
        next(self._call)

    def rest(self) -> grpc.RpcError:
        """Reads on to the error that ends it."""
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self._call:
                pass
        self._channel.close()
        return caught.value


def test_a_stalled_stream_ends_and_another_goes_on(served: Served, caplog: pytest.LogCaptureFixture):
    reading = served.client.stream("a", max_tokens=LONG, ignore_eos=True, request_id="read")
    reader = Reader(reading)
    stalled = Stalled(served, "stalled")
    eventually(lambda: ("stalled", None) in served.engine.cancelled, timeout=10)
    error: Any = stalled.rest()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "0.5 s" in error.details()
    assert "a stream of /jaxinfer.v1.GenerationService/GenerateStream was ended" in caplog.text
    so_far = reader.num_tokens
    eventually(lambda: reader.num_tokens > so_far)
    assert [id for id, _ in served.engine.cancelled] == ["stalled"]
    reading.cancel()
    reader.join()
    assert reader.is_in_order
    served.call(idle(served))


class Reader(threading.Thread):
    """Reads a stream as it comes, on a thread of its own."""

    def __init__(self, stream: Stream):
        super().__init__()
        self._stream = stream
        self.num_tokens, self.is_in_order, self._last = 0, True, ord("a")
        self.start()

    def run(self) -> None:
        with contextlib.suppress(grpc.RpcError):  # cancelled at the end
            for delta in self._stream:
                for token in delta.token_ids:
                    self.is_in_order &= token == (self._last + 1) % VOCAB_SIZE
                    self._last = token
                    self.num_tokens += 1


async def idle(served: Served) -> None:
    """Nothing is kept of either."""
    assert await served.server.served.calls.wait_idle(5)


def test_a_stream_that_waits_for_the_engine_is_not_stalled(served: Served):
    served.engine.paused = True
    stream = served.client.stream("ab", max_tokens=3)
    eventually(lambda: served.engine.rows)
    served.call(asyncio.sleep(1.0))
    served.engine.paused = False
    assert "".join(delta.text for delta in stream) == "cde"


def test_many_stalled_streams_leave_no_rows(served: Served):
    stalled = [Stalled(served, f"stalled{index}") for index in range(5)]
    eventually(lambda: len(served.engine.cancelled) == len(stalled), timeout=10)
    assert not served.engine.rows
    assert served.client.generate("ab", max_tokens=3).text == "cde"
    for one in stalled:
        one.rest()
    served.call(idle(served))


class Unread:
    """A call of Generate whose answer, of some megabytes, is not read until `read`."""

    def __init__(self, served: Served):
        self._channel = grpc.insecure_channel(served.server.address, options=(
            *SMALL_WINDOW, ("grpc.max_receive_message_length", -1)))
        sampling = pb.SamplingParams(max_tokens=4000, ignore_eos=True, logprobs=20)
        # As a stream: a client of the call as it is would read at once.
        self._call = self._channel.unary_stream("/jaxinfer.v1.GenerationService/Generate")(
            pb.GenerateRequest(text="a", sampling=sampling).SerializeToString())

    def read(self) -> pb.GenerateResponse:
        (data,) = self._call
        self._channel.close()
        return pb.GenerateResponse.FromString(data)


def test_an_answer_that_nobody_reads_gives_its_place_back(caplog: pytest.LogCaptureFixture):
    core = make_core(CountingEngine(tokens_per_step=500, pace=0.001))
    with serving(core, stall_timeout=1.0, max_calls=1) as served:
        unread = Unread(served)
        eventually(lambda: served.server.served.calls.ended["OK"] == 1)
        with pytest.raises(grpc.RpcError, match="the limit is 1"):
            served.client.load()
        eventually(lambda: "an answer of /jaxinfer.v1.GenerationService/Generate was given up" in caplog.text)
        eventually(lambda: accepted(served))
        assert len(unread.read().completions[0].token_ids) == 4000, "who reads it late still has all of it"


def accepted(served: Served) -> bool:
    try:
        return served.client.generate("ab", max_tokens=3).text == "cde"
    except grpc.RpcError:
        return False


def test_an_answer_that_waits_for_the_engine_is_not_stalled(served: Served):
    served.engine.paused = True
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.client.generate, "ab", max_tokens=3)
        eventually(lambda: served.engine.rows)
        served.call(asyncio.sleep(1.0))
        served.engine.paused = False
        assert answer.result(timeout=10).text == "cde"


def test_a_stop_does_not_wait_for_a_stalled_stream():
    core = make_core(CountingEngine(tokens_per_step=20, pace=0.01))
    with serving(core, stall_timeout=0.5, drain_seconds=30) as served:
        stalled = Stalled(served, "stalled")
        assert served.call(served.server.stop()) is True
        stalled.rest()
