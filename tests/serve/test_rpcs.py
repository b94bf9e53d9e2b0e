"""Every RPC over a real channel, against the counting engine: "ab" goes on "cdef...", token ids are bytes."""

import asyncio

import grpc
import pytest
from counting_engine import EOS, VOCAB_SIZE, CountingEngine, make_core
from serving import Served, serving

from serve.client import AsyncClient
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.protos.jaxinfer.v1 import generation_pb2_grpc as pb_grpc


def test_text_prompt(served: Served):
    done = served.client.generate("ab", max_tokens=4)
    assert done.text == "cdef"
    assert done.token_ids == tuple(b"cdef")
    assert (done.finish_reason, done.stop_reason) == ("length", None)
    assert (done.usage.prompt_tokens, done.usage.output_tokens, done.usage.cached_tokens) == (2, 4, 1)


def test_ids_prompt(served: Served):
    assert served.client.generate([10, 20], max_tokens=3).token_ids == (21, 22, 23)


def test_chat_prompt(served: Served):
    messages = [{"role": "system", "content": "xy"}, {"role": "user", "content": "ab"}]
    done = served.client.generate(messages, max_tokens=2)
    assert (done.text, done.usage.prompt_tokens) == ("cd", 4)


def test_timings_are_ordered(served: Served):
    timings = served.client.generate("ab", max_tokens=20).timings
    assert timings.queue is not None
    assert 0 <= timings.queue <= timings.ttft <= timings.total
    assert timings.decode == pytest.approx(timings.total - timings.ttft)
    assert timings.decode > 0.004  # ten steps of a millisecond and more
    assert timings.preemptions == 0


def test_long_prompts_are_tokenised_off_the_loop():
    with serving(make_core(CountingEngine(pace=0.001), max_model_len=20_000)) as served:
        assert served.client.generate("a" * 10_000, max_tokens=2).text == "bc"
        assert len(served.client.tokenize("a" * 10_000)) == 10_000


def test_unset_takes_the_models_default_and_zero_does_not(stepped: Served):
    for name, sampling in {"unset": {}, "zero": {"temperature": 0.0, "max_tokens": 3}}.items():
        call = stepped.client.stream("ab", request_id=name, **sampling)
        stepped.call(asyncio.sleep(0.05))
        rows = {row.request.params.temperature: row.request.max_tokens for row in stepped.engine.rows.values()}
        assert rows == ({0.7: 5} if name == "unset" else {0.0: 3})
        call.cancel()
        stepped.call(asyncio.sleep(0.05))


def test_stream_concatenates_to_the_unary_answer(served: Served):
    options = {"max_tokens": 30, "stop": "z", "logprobs": 2, "seed": 1}
    whole = served.client.generate("ab", **options)
    stream = served.client.stream("ab", request_id="mine", **options)
    deltas = list(stream)
    assert len(deltas) > 3
    assert "".join(delta.text for delta in deltas) == whole.text == "cdefghijklmnopqrstuvwxy"
    assert sum((delta.token_ids for delta in deltas), ()) == whole.token_ids
    assert sum((delta.logprobs for delta in deltas), ()) == whole.logprobs
    for last in (deltas[-1], whole):
        assert (last.finish_reason, last.stop_reason) == ("stop", "z")
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    assert stream.request_id == "mine"
    assert stream.usage == whole.usage and stream.timings is not None


def test_samples(served: Served):
    done = served.client.generate("ab", n=3, max_tokens=4)
    assert [sample.index for sample in done.samples] == [0, 1, 2]
    assert [sample.text for sample in done.samples] == ["cdef"] * 3
    assert done.usage.output_tokens == 12
    texts = {0: "", 1: "", 2: ""}
    for delta in served.client.stream("ab", n=3, max_tokens=4):
        texts[delta.index] += delta.text
    assert texts == {0: "cdef", 1: "cdef", 2: "cdef"}


def test_tokens_of_all_samples_ready_together_travel_in_one_message(stepped: Served):
    request = pb.GenerateRequest(text="ab", sampling=pb.SamplingParams(n=4, max_tokens=2))
    with grpc.insecure_channel(stepped.server.address) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateStream(request)
        for text in "cd":
            while len(stepped.engine.rows) != 4:
                stepped.call(asyncio.sleep(0.001))
            stepped.engine.step()
            message = next(call)
            assert [(delta.index, delta.text) for delta in message.deltas] == [(index, text) for index in range(4)]
        assert message.usage.output_tokens == 8


def test_a_stop_string_cancels_the_row(stepped: Served):
    stepped.engine.tokens_per_step = 4
    stream = iter(stepped.client.stream("ab", max_tokens=100, stop="f", request_id="s"))
    while not stepped.engine.rows:
        stepped.call(asyncio.sleep(0.001))
    stepped.engine.step()
    delta = next(stream)
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("cde", tuple(b"cdef"), "f")
    assert list(stream) == []
    assert stepped.engine.cancelled == [("s", 0)] and not stepped.engine.rows


def test_stop_ids_and_end_of_sequence(served: Served):
    stopped = served.client.generate("ab", max_tokens=50, stop_token_ids=[ord("e")])
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("cd", "stop", ord("e"))
    ended = served.client.generate([250], max_tokens=50)
    assert ended.token_ids == (251, 252, 253, 254, 255, EOS)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert served.client.generate([250], max_tokens=50, ignore_eos=True).finish_reason == "length"


def test_never_half_a_character(served: Served):
    # The bytes 0xC3 0xC4 ... never complete a character: U+FFFD, and the same text streamed and whole.
    whole = served.client.generate([0xC2], max_tokens=6)
    assert "".join(delta.text for delta in served.client.stream([0xC2], max_tokens=6)) == whole.text


def test_without_detokenizing_there_are_ids_only(served: Served):
    request = pb.GenerateRequest(text="ab", sampling=pb.SamplingParams(detokenize=False, max_tokens=3))
    with grpc.insecure_channel(served.server.address) as channel:
        found = pb_grpc.GenerationServiceStub(channel).Generate(request)
    assert list(found.completions[0].token_ids) == list(b"cde")
    assert not found.completions[0].HasField("text")


def test_logprobs(served: Served):
    done = served.client.generate("ab", max_tokens=2, logprobs=3, prompt_logprobs=1)
    chosen = done.logprobs[0]
    assert (chosen.token_id, chosen.rank, chosen.text) == (ord("c"), 2, "c")
    assert chosen.logprob == pytest.approx(-1.5)
    assert [(top.token_id, top.rank) for top in chosen.top] == [(ord("d"), 1), (ord("c"), 2), (ord("f"), 3)]
    assert [one.token_id for one in done.prompt_logprobs] == [ord("b")]
    assert len(done.prompt_logprobs[0].top) == 1
    stream = served.client.stream("ab", max_tokens=2, logprobs=0, prompt_logprobs=1)
    assert all(one.top == () for delta in stream for one in delta.logprobs)
    assert stream.prompt_logprobs == done.prompt_logprobs


def test_long_prompt_logprobs_come_in_pieces():
    with serving(make_core(CountingEngine(pace=0.001), max_model_len=4000)) as served:
        stream = served.client.stream([7] * 3000, max_tokens=1, prompt_logprobs=0)
        assert len(list(stream)) == 1
        assert len(stream.prompt_logprobs) == 2999


def test_tokenize_and_detokenize(served: Served):
    client = served.client
    assert client.tokenize("héllo") == list("héllo".encode())
    assert client.tokenize([{"role": "user", "content": "hi"}]) == list(b"hi")
    assert client.detokenize(list("héllo".encode())) == "héllo"
    assert client.detokenize([104, EOS]) == "h"
    assert client.detokenize([104, EOS], skip_special_tokens=False) == "h<eos>"
    assert client.detokenize([]) == ""


def test_model_info_and_load(served: Served):
    info = served.client.model_info()
    assert (info.name, info.vocab_size, info.eos_token_ids) == ("counting", VOCAB_SIZE, (EOS,))
    assert info.has_tokenizer and info.has_chat_template
    load = served.client.load()
    assert (load.num_running, load.pages_used, load.pages_cached, load.pages_total) == (0, 3, 2, 64)


def test_without_a_tokenizer_ids_go_in_and_out():
    with serving(make_core(CountingEngine(pace=0.001), with_tokenizer=False)) as served:
        done = served.client.generate([1], max_tokens=2)
        assert (done.token_ids, done.text) == ((2, 3), "")
        assert not served.client.model_info().has_tokenizer


def test_request_ids(served: Served):
    assert served.client.generate("ab", request_id="mine").request_id == "mine"
    generated = {served.client.generate("ab").request_id for _ in range(3)}
    assert len(generated) == 3 and all(generated)


def test_one_id_may_run_twice_at_once(stepped: Served):
    streams = [stepped.client.stream(prompt, request_id="same", max_tokens=2) for prompt in ("ab", "kl")]
    while len(stepped.engine.rows) < 2:
        stepped.call(asyncio.sleep(0.001))
    stepped.engine.step()
    stepped.engine.step()
    assert ["".join(delta.text for delta in stream) for stream in streams] == ["cd", "mn"]


def test_async_client(served: Served):
    async def use() -> None:
        async with AsyncClient(served.server.address) as client:
            await client.wait_ready(5)
            whole = await client.generate("ab", max_tokens=3)
            async with client.stream("ab", max_tokens=3) as stream:
                text = "".join([delta.text async for delta in stream])
            assert text == whole.text == "cde" and stream.usage == whole.usage
            assert await client.detokenize(await client.tokenize("hi")) == "hi"
            assert (await client.model_info()).name == "counting"
            assert (await client.load()).pages_total == 64

    asyncio.run(use())
