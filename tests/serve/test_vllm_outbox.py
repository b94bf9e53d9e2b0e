"""The outbox of the service for gateways: whatever the reader's pace, every sample arrives whole and once."""

import pytest
from counting_engine import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.outputs import Delta, Logprob
from jaxinfer.types import Request, SamplingParams
from serve.generation import Generation

pytest.importorskip("smg_grpc_proto", reason="needs smg-grpc-proto")

from smg_grpc_proto.generated.vllm_engine_pb2 import GenerateResponse

from serve.vllm_codec import MAX_TOKENS_PER_MESSAGE, Outbox


def outbox(n: int = 1, logprobs: int | None = None) -> Outbox:
    params = SamplingParams(n=n, logprobs=logprobs, prompt_logprobs=0)
    return Outbox(Generation(Request(id="r", prompt=(1, 2), params=params, max_tokens=9, seed=0), byte_tokenizer()))


def take_all(box: Outbox) -> list:
    found = []
    while box.messages:
        found.append(box.take())
    return found


steps = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 700), st.booleans()), max_size=30)
"""Of a sample, so many new tokens, and whether the reader then takes one message."""


@given(steps, st.sets(st.integers(0, 2)))
def test_each_sample_arrives_in_order_and_whole(plan: list[tuple[int, int, bool]], ended: set[int]):
    box, said, taken, position = outbox(3), {0: [], 1: [], 2: []}, [], 0
    for index, count, takes in plan:
        ids = list(range(position, position + count))
        position += count
        said[index] += ids
        box.add(Delta("r", index, token_ids=ids))
        if takes and box.messages:
            taken.append(box.take())
    for index in sorted(ended):
        box.add(Delta("r", index, finish_reason="length"))
    box.abort()
    taken += take_all(box)
    chunks = [one.chunk for one in taken if one.HasField("chunk")]
    ends = {one.complete.index: one.complete for one in taken if one.HasField("complete")}
    assert sorted(ends) == [0, 1, 2]
    for index, ids in said.items():
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [id for chunk in own for id in chunk.token_ids] == ids
        assert sum(chunk.completion_tokens for chunk in own) == ends[index].completion_tokens == len(ids)
        assert ends[index].finish_reason == ("length" if index in ended else "abort")


@given(steps)
def test_a_lone_sample_arrives_whole_though_its_messages_are_used_again(plan: list[tuple[int, int, bool]]):
    """gRPC serialises a message when it is taken, but for the first, which waits for the headers."""
    box, said, taken, sent = outbox(1), [], [], []
    for _, count, takes in plan:
        ids = list(range(len(said), len(said) + count))
        said += ids
        box.add(Delta("r", 0, token_ids=ids))
        if takes and box.messages:
            taken.append(box.take())
            sent.append(taken[-1].SerializeToString())
    if taken:
        assert taken[0].SerializeToString() == sent[0]
    box.abort()
    sent += [message.SerializeToString() for message in take_all(box)]
    chunks = [GenerateResponse.FromString(raw).chunk for raw in sent]
    assert [id for chunk in chunks for id in chunk.token_ids] == said
    assert sum(chunk.completion_tokens for chunk in chunks) == len(said)


def test_a_slow_reader_gets_fewer_and_bounded_messages():
    box = outbox(2)
    for position in range(2 * MAX_TOKENS_PER_MESSAGE):
        for index in (0, 1):
            box.add(Delta("r", index, token_ids=[position]))
    assert [(one.chunk.index, len(one.chunk.token_ids)) for one in take_all(box)] == [
        (0, MAX_TOKENS_PER_MESSAGE), (1, MAX_TOKENS_PER_MESSAGE)] * 2


def test_a_message_that_was_taken_grows_no_more():
    box = outbox()
    box.add(Delta("r", 0, token_ids=[1]))
    first = box.take()
    box.add(Delta("r", 0, token_ids=[2]))
    assert list(first.chunk.token_ids) == [1] and list(box.take().chunk.token_ids) == [2]


def test_log_probabilities_stay_with_their_tokens():
    box = outbox(logprobs=1)
    box.add_prompt_logprobs([None, {2: Logprob(-0.5, 1)}])
    for id in (3, 4):
        box.add(Delta("r", 0, token_ids=[id], logprobs=[{id: Logprob(-float(id), 2), 9: Logprob(-0.25, 1)}]))
    (message,) = take_all(box)
    found = message.chunk.output_logprobs
    assert (list(found.token_ids), list(found.token_logprobs)) == ([3, 4], [-3.0, -4.0])
    assert [(list(one.token_ids), list(one.values)) for one in found.top_logprobs] == [([9], [-0.25])] * 2
    assert list(message.chunk.input_logprobs.token_ids) == [1, 2]


def test_messages_that_grow_no_more_wait_as_bytes():
    box, most = outbox(2, logprobs=20), MAX_TOKENS_PER_MESSAGE // 85
    for id in range(3 * most):
        for index in (0, 1):
            box.add(Delta("r", index, token_ids=[id], logprobs=[{id: Logprob(-float(id), 1)}]))
    assert [isinstance(one, bytes) for one in box.messages] == [True] * 4 + [False] * 2
    taken = take_all(box)
    assert [(one.chunk.index, len(one.chunk.token_ids)) for one in taken] == [(0, most), (1, most)] * 3
    for index in (0, 1):
        own = [one.chunk.output_logprobs for one in taken if one.chunk.index == index]
        assert [value for one in own for value in one.token_logprobs] == [-float(id) for id in range(3 * most)]


def test_a_sample_whose_message_was_taken_as_bytes_goes_on_in_its_newest_one():
    box = outbox()
    for id in range(MAX_TOKENS_PER_MESSAGE + 1):
        box.add(Delta("r", 0, token_ids=[id]))
    assert len(box.take().chunk.token_ids) == MAX_TOKENS_PER_MESSAGE
    box.add(Delta("r", 0, token_ids=[0]))
    assert [len(one.chunk.token_ids) for one in take_all(box)] == [2]
