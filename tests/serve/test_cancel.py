"""Requests that end early: cancels, deadlines, disconnects, slow readers. The engine must be rid of them at once."""

import asyncio
import gc
import random
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from counting_engine import VOCAB_SIZE, CountingEngine, make_core
from serving import Served, eventually, serving

from serve import codec
from serve.client import AsyncClient
from serve.codec import Outbox
from serve.generation import Generation
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc

MAX_TOKENS = 100_000


def submitted(served: Served, number: int = 1) -> None:
    eventually(lambda: len(served.engine.rows) == number)


def test_cancel_while_waiting_for_tokens(stepped: Served):
    stream = stepped.client.stream("ab", max_tokens=100, request_id="w")
    submitted(stepped)
    stepped.engine.step()
    assert next(iter(stream)).text == "c"
    stream.cancel()
    eventually(lambda: stepped.engine.cancelled == [("w", None)])
    assert not stepped.engine.rows
    stepped.engine.step()  # late chunks, if there were any, would have nowhere to go
    assert stepped.engine.num_steps == 2


def test_cancel_before_the_first_token(stepped: Served):
    stream = stepped.client.stream("ab", n=3, max_tokens=100, request_id="w")
    submitted(stepped, 3)
    stream.cancel()
    eventually(lambda: stepped.engine.cancelled == [("w", None)])


@pytest.fixture
def outboxes(monkeypatch: pytest.MonkeyPatch) -> list[Outbox]:
    """The outboxes of the streams that the test opens."""
    found: list[Outbox] = []

    class Noted(Outbox):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(codec, "Outbox", Noted)
    return found


def test_cancel_inside_a_send(stepped: Served, outboxes: list[Outbox]):
    """The reader has stopped, so the handler hangs in `yield`; the cancel arrives there as GeneratorExit."""
    stepped.engine.tokens_per_step = 500
    with narrow_channel(stepped) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateStream(endless("y"))
        submitted(stepped)
        step_until_blocked(stepped, outboxes)
        call.cancel()
        eventually(lambda: stepped.engine.cancelled == [("y", None)])


def narrow_channel(served: Served) -> grpc.Channel:
    """A channel that takes 64 KiB before its reader must read, so that a test can stop it soon."""
    return grpc.insecure_channel(served.server.address,
                                 options=[("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)])


def endless(request_id: str, max_tokens: int = MAX_TOKENS) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="ab", request_id=request_id,
                              sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def step_until_blocked(served: Served, outboxes: list[Outbox]) -> None:
    """Until messages pile up in the only stream's outbox."""
    for _ in range(MAX_TOKENS // served.engine.tokens_per_step - 1):
        served.engine.step()
        time.sleep(0.002)
        if len(outboxes[0].messages) > 1:
            return
    raise AssertionError("the stream never blocked")


def test_cancel_of_a_unary_call(stepped: Served):
    with grpc.insecure_channel(stepped.server.address) as channel:
        call = pb_grpc.GenerationServiceStub(channel).Generate.future(pb.GenerateRequest(text="ab", request_id="u"))
        submitted(stepped)
        call.cancel()
        eventually(lambda: stepped.engine.cancelled == [("u", None)])


@pytest.mark.parametrize("steps", [0, 2])
def test_deadline(stepped: Served, steps: int):
    stream = stepped.client.stream("ab", max_tokens=100, timeout=0.2, request_id="d")
    submitted(stepped)
    began = time.monotonic()
    for _ in range(steps):
        stepped.engine.step()
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: stepped.engine.cancelled == [("d", None)])
    assert time.monotonic() - began < 1.0


def test_deadline_of_a_unary_call(stepped: Served):
    with pytest.raises(grpc.RpcError) as caught:
        stepped.client.generate("ab", timeout=0.1, request_id="d")
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: stepped.engine.cancelled == [("d", None)])


def test_leaving_the_stream_cancels(stepped: Served):
    with stepped.client.stream("ab", max_tokens=100, request_id="l") as stream:
        submitted(stepped)
        stepped.engine.step()
        assert next(iter(stream)).text == "c"
    eventually(lambda: stepped.engine.cancelled == [("l", None)])


def test_a_slow_reader_gets_few_large_bounded_messages(stepped: Served):
    """The engine runs ahead of a reader that has stopped: what waits grows together, nothing is lost or reordered."""
    per_step = stepped.engine.tokens_per_step = 100
    with narrow_channel(stepped) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateStream(endless("s"))
        submitted(stepped)
        for _ in range(MAX_TOKENS // per_step):
            stepped.engine.step()
            time.sleep(0.0005)
        assert not stepped.engine.rows  # it never waited for the reader
        messages = list(call)
    sizes = [len(message.deltas[0].token_ids) for message in messages]
    ids = [id for message in messages for id in message.deltas[0].token_ids]
    assert ids == [(ord("b") + 1 + step) % VOCAB_SIZE for step in range(MAX_TOKENS)]
    assert len(messages) < MAX_TOKENS / per_step / 2
    assert 1024 <= max(sizes) < 1024 + per_step
    assert messages[-1].usage.output_tokens == MAX_TOKENS


def test_a_stop_string_ends_the_row_even_if_the_reader_has_stopped(stepped: Served, outboxes: list[Outbox]):
    stepped.engine.tokens_per_step = 500
    request = endless("s", 2 * MAX_TOKENS)
    request.sampling.stop.append(chr(1))  # comes every 257 tokens, counts after min_tokens
    request.sampling.min_tokens = MAX_TOKENS
    with narrow_channel(stepped) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateStream(request)
        submitted(stepped)
        step_until_blocked(stepped, outboxes)
        while stepped.engine.rows:
            stepped.engine.step()
            time.sleep(0.001)
        assert stepped.engine.cancelled == [("s", 0)]
        last = list(call)[-1]
    assert last.deltas[0].stop_string == chr(1)
    assert MAX_TOKENS < last.usage.output_tokens <= MAX_TOKENS + VOCAB_SIZE


def test_disconnect_storm():
    """200 clients that leave at random moments; the engine ends with nothing, and goes on serving."""
    engine = CountingEngine(tokens_per_step=2, pace=0.002)
    with serving(make_core(engine)) as served:
        asyncio.run(storm(served.server.address, 200))
        eventually(lambda: not engine.rows)
        bridge = served.server.served._bridge
        assert bridge is not None
        eventually(lambda: not bridge.num_streams)  # the engine lets go of a row before the loop has its last tokens
        eventually(lambda: served.server.served.calls.num_running == 0)
        assert len(engine.cancelled) > 10
        assert served.client.generate("ab", max_tokens=3).text == "cde"


async def storm(address: str, number: int) -> None:
    rng = random.Random(7)

    async def one(client: AsyncClient) -> None:
        await asyncio.sleep(rng.random() * 0.5)
        options = {"max_tokens": 300, "n": rng.choice((1, 2))}
        unary = rng.random() < 0.3
        task = asyncio.ensure_future(client.generate("ab", **options) if unary else consume(client, options))
        await asyncio.wait({task}, timeout=rng.random() * 0.2)
        task.cancel()
        await asyncio.wait({task})

    async def consume(client: AsyncClient, options: dict) -> None:
        async for _ in client.stream("ab", **options):
            pass

    clients = [AsyncClient(address) for _ in range(10)]
    await asyncio.gather(*(one(clients[index % 10]) for index in range(number)))
    for client in clients[:5]:
        await client.close()
    for client in clients[5:]:
        await client.close()


def test_a_killed_client_frees_its_row(stepped: Served, repository: Path):
    script = (f"from serve.client import Client\nstream = Client({stepped.server.address!r}).stream('ab', "
              "max_tokens=100, request_id='k')\nfor delta in stream: print(delta.text, flush=True)")
    with subprocess.Popen([sys.executable, "-c", script], cwd=repository, stdout=subprocess.PIPE, text=True) as client:
        submitted(stepped)
        stepped.engine.step()
        assert client.stdout is not None and client.stdout.readline() == "c\n"
        client.kill()
    eventually(lambda: stepped.engine.cancelled == [("k", None)])


def test_nothing_of_a_request_outlives_it():
    """Without the garbage collector: prompts, outputs and log-probabilities would wait for it."""
    def alive() -> list[Generation]:
        return [one for one in gc.get_objects() if isinstance(one, Generation)]

    gc.collect()
    earlier = alive()  # tracebacks of errors that are parameters of other tests hold some for good

    def left() -> list[Generation]:
        return [one for one in alive() if all(one is not other for other in earlier)]

    gc.disable()
    try:
        with serving(make_core()) as served:
            assert served.client.generate([1], max_tokens=3).token_ids
            assert list(served.client.stream([1], max_tokens=3))
            stream = served.client.stream([1], max_tokens=MAX_TOKENS)
            next(iter(stream))
            eventually(lambda: len(left()) == 1)  # a client may have its answer before the server's frame is gone
            stream.cancel()
            eventually(lambda: not left())
    finally:
        gc.enable()
