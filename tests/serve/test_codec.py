"""Messages: what waits together travels together, bounded, and nothing of an earlier message shows in a later one."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer.core import ModelInfo
from jaxinfer.outputs import Delta, Logprob
from jaxinfer.types import RequestStats, SamplingParams
from serve import codec
from serve.protos.jaxinfer.v1 import generation_pb2 as pb


def outbox(**params) -> codec.Outbox:
    return codec.Outbox("r", SamplingParams(**params), has_text=True)


def sent(box: codec.Outbox) -> pb.GenerateStreamResponse:
    """The oldest message as it goes over the wire."""
    return pb.GenerateStreamResponse.FromString(box.take().SerializeToString())


def delta(text: str, *ids: int, index: int = 0, **rest) -> Delta:
    return Delta("r", index, text, list(ids), **rest)


def test_what_waits_together_travels_together():
    box = outbox(n=2)
    box.add(delta("a", 1))
    box.add(delta("x", 7, index=1))
    box.add(delta("b", 2, 3))
    message = sent(box)
    assert message.request_id == "r" and not box.messages
    first, second = message.deltas
    assert (first.index, first.text, list(first.token_ids)) == (0, "ab", [1, 2, 3])
    assert (second.index, second.text, list(second.token_ids)) == (1, "x", [7])


def test_a_message_sent_again_holds_only_what_is_new():
    box = outbox()
    texts = [("first", (1, 2)), ("second", (3,)), ("", (4, 5, 6)), ("fourth", ()), ("", (7,))]
    found = []
    for text, ids in texts:
        box.add(delta(text, *ids))
        found.append(sent(box))
    assert [(one.deltas[0].text, tuple(one.deltas[0].token_ids)) for one in found] == texts
    assert [one.request_id for one in found] == ["r", "", "", "", ""]
    assert all(len(one.deltas) == 1 and one.deltas[0].HasField("index") for one in found)


def test_a_message_that_waits_is_never_written_over():
    box = outbox()
    for number in range(4):
        box.add(delta(str(number), *[number] * codec.MAX_TOKENS_PER_MESSAGE))
    box.add(delta("end", 9))
    assert [sent(box).deltas[0].text for _ in range(2)] == ["0", "1"]
    box.add(delta("!", 9))
    assert [sent(box).deltas[0].text for _ in range(3)] == ["2", "3", "end!"]
    box.add(delta("more", 9))
    assert sent(box).deltas[0].text == "more"


def test_the_last_message_has_everything():
    box = outbox()
    for text in ("a", "b"):
        box.add(delta(text, 1))
        sent(box)
    box.add(delta("c", 1, finish_reason="stop", stop_reason="END"))
    box.close(RequestStats(arrival=1.0, scheduled=1.5, first_token=2.0, finished=4.0, num_prompt_tokens=3,
                           num_output_tokens=3, num_cached_tokens=0, num_preemptions=1))
    last = sent(box)
    assert last.deltas[0].finish_reason == pb.FINISH_REASON_STOP and last.deltas[0].stop_string == "END"
    assert last.usage == pb.Usage(prompt_tokens=3, output_tokens=3, cached_tokens=0)
    assert last.timings == pb.Timings(queue=0.5, ttft=1.0, decode=2.0, total=3.0, preemptions=1)


def test_what_the_engine_has_not_said_stays_unset():
    stats = RequestStats(arrival=1.0, first_token=2.0, finished=3.0)
    assert not codec.usage(stats).HasField("cached_tokens")
    assert not codec.timings(stats).HasField("queue")


def test_the_largest_message_fits_into_grpcs_default_limit():
    box = outbox(logprobs=20)
    position = {id: Logprob(-12.5, rank, "a long token's text") for rank, id in enumerate(range(100_000, 100_020), 1)}
    ids = range(100_000, 100_000 + codec.MAX_TOKENS_PER_MESSAGE + 7)
    box.add(delta("x" * 8 * len(ids), *ids, logprobs=[position] * len(ids)))
    message = box.take()
    assert len(message.deltas[0].logprobs[0].top) == 20
    assert message.ByteSize() < 4 * 1024 * 1024


@pytest.mark.parametrize(("logprobs", "most"), [(None, 1024), (0, 1024 // 5), (20, 1024 // 85)])
def test_what_waits_behind_the_newest_message_is_bytes(logprobs: int | None, most: int):
    """A message that may grow is the only one of objects, and the smaller the more a token brings along."""
    box, position = outbox(logprobs=logprobs), {7: Logprob(-0.5, 1, "g"), 8: Logprob(-1.5, 2, "h")}
    for _ in range(3 * most):
        box.add(delta("g", 7, logprobs=None if logprobs is None else [position]))
    box.add(delta("", finish_reason="length"))
    box.close(RequestStats(arrival=1.0, first_token=2.0, finished=4.0))
    assert [isinstance(one, bytes) for one in box.messages][:-1] == [True] * (len(box.messages) - 1)
    assert isinstance(box.messages[-1], pb.GenerateStreamResponse)
    taken = [sent(box) for _ in range(len(box.messages))]
    assert all(len(one.deltas[0].token_ids) <= most + 1 for one in taken)
    assert sum(len(one.deltas[0].token_ids) for one in taken) == 3 * most
    assert sum(len(one.deltas[0].logprobs) for one in taken) == (0 if logprobs is None else 3 * most)
    assert taken[0].request_id == "r" and taken[-1].HasField("usage")
    assert "".join(one.deltas[0].text for one in taken) == "g" * 3 * most


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("logprobs", [None, 20])
def test_what_waits_takes_memory_as_its_bytes_do(logprobs: int | None):
    """Of 100 readers that have stopped: each step's text joins the one before, 1,000 times."""
    position = {id: Logprob(-0.5 * id, id, "x") for id in range(1, 21)}
    boxes, before = [outbox(logprobs=logprobs) for _ in range(100)], resident_bytes()
    for _ in range(1000 if logprobs is None else 100):
        for box in boxes:
            box.add(delta("a word", 1, logprobs=None if logprobs is None else [position]))
    assert resident_bytes() - before < 20_000_000
    assert len("".join(entry.text for entry in (sent(boxes[0]).deltas))) >= 6 * 12


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_log_probabilities_of_a_long_prompt_wait_as_bytes_too():
    box, position = outbox(prompt_logprobs=1), {7: Logprob(-0.5, 1, "g")}
    box.add_prompt_logprobs([None, *[position] * 3000])
    box.add(delta("a", 1))
    assert [isinstance(one, bytes) for one in box.messages] == [True, True, True, False]
    taken = [sent(box) for _ in range(4)]
    assert [len(one.prompt_logprobs) for one in taken] == [1023, 1024, 953, 0]


def test_only_fields_that_were_sent_replace_the_defaults():
    defaults = SamplingParams(temperature=0.7, top_k=50, max_tokens=20)
    message = pb.SamplingParams(temperature=0.0, stop=["a", "b"], stop_token_ids=[3], ignore_eos=False, seed=0)
    found = codec.sampling_params(message, defaults)
    assert found == SamplingParams(
        temperature=0.0, top_k=50, max_tokens=20, stop=("a", "b"), stop_token_ids=(3,), seed=0)
    assert codec.sampling_params(pb.SamplingParams(), defaults) == defaults


INFO = ModelInfo("demo", "llama", 10, 20, "float32", 30, (1,), has_tokenizer=True, has_chat_template=False)


@pytest.mark.parametrize(("model", "name"), [
    ("demo", "demo"), ("/srv/private/Qwen3-0.6B", "Qwen3-0.6B"), ("models/tiny/", "tiny"), ("~/models/tiny", "tiny"),
    ("/srv/tiny/.", "tiny"), (".", "here"), ("", "here"), ("..", "above"), ("sub/..", "here"), ("/", "/"),
])
def test_clients_see_the_last_part_of_a_models_path(model: str, name: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "above" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert codec.model_info(replace(INFO, name=model)).name == name


def test_a_folder_that_is_gone_does_not_take_the_models_name_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError):
        os.getcwd()
    assert codec.model_info(INFO).name == "demo"
