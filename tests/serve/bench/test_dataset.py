"""Prompts: random ones of the lengths that were asked for, and those of files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer.core import ModelInfo
from jaxinfer.errors import InvalidConfig
from serve.bench import dataset
from serve.bench.config import BenchConfig

INFO = ModelInfo("m", "llama", 50, 4096, "float32", 1, (0, 49), True, False)


def samples(num: int = 200, info: ModelInfo = INFO, **options) -> list[dataset.Sample]:
    return dataset.random_samples(BenchConfig(**options), info, num)


def test_lengths_are_those_asked_for():
    assert {(len(one.prompt), one.output_len) for one in samples(random_input_len=7, random_output_len=3)} == {(7, 3)}
    found = samples(random_input_len=10, random_output_len=20, random_range_ratio=0.5, random_prefix_len=4)
    assert {len(one.prompt) for one in found} == set(range(9, 20))
    assert {one.output_len for one in found} == set(range(10, 31))
    assert {one.output_len for one in samples(output_len=9, random_range_ratio=0.5)} == {9}


def test_prompts_share_the_prefix_and_never_end_a_sequence():
    found = samples(random_input_len=30, random_prefix_len=5)
    assert len({tuple(one.prompt[:5]) for one in found}) == 1
    assert len({tuple(one.prompt[5:]) for one in found}) == len(found)
    assert {id for one in found for id in one.prompt} == set(range(1, 49))


def test_the_seed_decides():
    assert samples(seed=1) == samples(seed=1) != samples(seed=2)


def test_a_prefix_alone_is_a_prompt():
    assert {len(one.prompt) for one in samples(random_input_len=0, random_prefix_len=5)} == {5}


def test_a_model_that_is_too_short_is_named():
    with pytest.raises(InvalidConfig, match=r"random_input_len: .* up to 11 tokens; m takes 10;"):
        samples(info=replace(INFO, max_model_len=10), random_input_len=8, random_output_len=3)


def from_file(path: Path, text: str, num: int, **options) -> list[dataset.Sample]:
    path.write_text(text, encoding="utf-8")
    return dataset.file_samples(BenchConfig(dataset_path=str(path), **options), num)


LINES = '{"prompt": "a", "output_tokens": 3}\n\n{"prompt": [1, 2]}\n{"prompt": [{"role": "user", "content": "hi"}]}\n'


def test_lines_of_prompts(tmp_path):
    found = from_file(tmp_path / "x.jsonl", LINES, 3)
    assert sorted(map(str, (one.prompt for one in found))) == ["[1, 2]", "[{'role': 'user', 'content': 'hi'}]", "a"]
    assert {one.output_len for one in found} == {3, 256}
    assert {one.output_len for one in from_file(tmp_path / "x.jsonl", LINES, 3, output_len=5)} == {5}


def test_the_seed_decides_the_order(tmp_path):
    text = "".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(50))
    first, again, other = ([one.prompt for one in from_file(tmp_path / "x.jsonl", text, 50, seed=seed)]
                           for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other)
    assert first != sorted(first, key=int)


def test_few_prompts_are_gone_through_again(tmp_path):
    found = from_file(tmp_path / "x.jsonl", LINES, 7)
    assert found[:3] == found[3:6] and found[6] == found[0]


def test_conversations(tmp_path):
    turns = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": "long answer"}], [{"value": "alone"}], None]
    text = json.dumps([{"conversations": one} for one in turns] + [3])
    (one,) = from_file(tmp_path / "x.json", text, 1)
    assert (one.prompt, one.answer) == ("q", "long answer")
    (one,) = from_file(tmp_path / "x.json", text, 1, output_len=8)
    assert (one.answer, one.output_len) == (None, 8)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("x.jsonl", "", "has no prompts"),
    ("x.jsonl", "\n \n", "has no prompts"),
    ("x.json", "[]", "has no prompts"),
    ("x.json", "{}", "needs a JSON list of conversations"),
    ("x.json", "[", "is not JSON"),
    ("x.jsonl", '{"prompt": "a"}\n{', "line 2: is not JSON"),
    ("x.jsonl", '{"text": "a"}', 'line 1: needs an object with "prompt"'),
    ("x.jsonl", '["a"]', 'line 1: needs an object with "prompt"'),
    ("x.jsonl", '{"prompt": ""}', 'line 1: needs an object with "prompt"'),
    ("x.jsonl", '{"prompt": [true]}', 'line 1: needs an object with "prompt"'),
    ("x.jsonl", '{"prompt": [{"role": "user"}]}', 'line 1: needs an object with "prompt"'),
    ("x.jsonl", '{"prompt": "a", "output_tokens": 0}', "line 1: output_tokens must be an integer of at least 1, got 0"),
    ("x.jsonl", '{"prompt": "a", "output_tokens": "3"}', "output_tokens must be an integer"),
])  # fmt: skip
def test_a_bad_file_is_refused_by_name(tmp_path, name, text, message):
    with pytest.raises(InvalidConfig, match=r"^dataset_path: ") as error:
        from_file(tmp_path / name, text, 1)
    assert message in str(error.value) and name in str(error.value)


def test_a_file_that_is_no_text_or_is_not_there(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match="is not UTF-8 text"):
        dataset.file_samples(BenchConfig(dataset_path=str(tmp_path / "x.jsonl")), 1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dataset.file_samples(BenchConfig(dataset_path=str(tmp_path / "nowhere.jsonl")), 1)
