import dataclasses
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxinfer.chat_template import ChatTemplate
from jaxinfer.errors import InvalidRequest, ModelFormatError, TokenizerMissing
from jaxinfer.intake import GenerationDefaults, Intake, Prompt
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import MAX_STOP_IDS, SamplingParams
from jaxinfer.validation import Limits

LIMITS = Limits(vocab_size=300, max_model_len=64)
DEFAULTS = GenerationDefaults(SamplingParams(temperature=0.5), eos_token_ids=(0, 7))


def byte_tokenizer() -> Tokenizer:
    """Bytes as tokens; <s> (id 0) is put first."""
    vocab = {"<s>": 0} | {char: 1 + i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, {"bos_token": "<s>"})


TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def intake():
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
                            "{% if add_generation_prompt %}>{% endif %}", TOKENIZER.special_tokens)
    yield Intake(TOKENIZER, LIMITS, DEFAULTS, chat_template=template, seeds=random.Random(0))
    template.close()


def test_text_ids_messages_and_prompts_give_the_same_request(intake):
    messages = [{"role": "user", "content": "hi"}]
    text = "user:hi\n>"
    ids = TOKENIZER.encode(text)
    assert ids[0] == 0 and ids.count(0) == 1
    for prompt in (text, ids, tuple(ids), np.array(ids), messages, Prompt(tuple(ids), "x")):
        made = intake.request(prompt, SamplingParams(seed=1))
        assert made.prompt == tuple(ids) and all(type(id) is int for id in made.prompt)
    assert intake.read(messages) == Prompt(tuple(ids), "<s>" + text)
    assert intake.read(text) == Prompt(tuple(ids), text)
    assert intake.read(ids) == Prompt(tuple(ids), None)
    assert intake.chat(messages, add_generation_prompt=False).text == "<s>user:hi\n"


def test_a_request_leaves_nothing_open(intake):
    before = time.monotonic()
    made = intake.request([1, 2], SamplingParams(max_tokens=None, stop_token_ids=[9, 7], seed=-5), request_id="mine",
                          priority=np.int32(-3), cache_salt="tenant")
    assert (made.id, made.prompt, made.max_tokens, made.seed, made.stop_ids) == ("mine", (1, 2), 62, -5, (0, 7, 9))
    assert (made.priority, made.cache_salt) == (-3, "tenant")
    assert before <= made.arrival <= time.monotonic()
    assert intake.request([1], SamplingParams(ignore_eos=True)).stop_ids == ()
    assert dataclasses.replace(made) == made and hash(made)


def test_the_models_defaults_serve_only_who_gives_none(intake):
    assert intake.request([1]).params.temperature == 0.5
    assert intake.request([1], SamplingParams()).params.temperature == 1.0


def test_the_models_own_length_shrinks_to_what_is_left(intake):
    made = [intake.request([1] * length).max_tokens for length in (48, 49, 63)]
    assert made == [16, 15, 1]
    with pytest.raises(InvalidRequest):
        intake.request([1] * 49, SamplingParams())
    with pytest.raises(InvalidRequest, match="prompt"):
        intake.request([1] * 64)


def test_unseeded_requests_draw_from_the_given_generator(intake):
    def seeds(generator):
        return [intake.request([1], seeds=generator).seed for _ in range(3)]

    assert seeds(random.Random(5)) == seeds(random.Random(5)) != seeds(random.Random(6))
    assert len(set(seeds(None))) == 3
    assert all(0 <= seed < 2**63 for seed in seeds(None))


def test_generated_ids_are_unique_in_threads(intake):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: intake.request("hello"), range(200)))
    assert len({one.id for one in made}) == len({one.seed for one in made}) == 200


def test_refusals(intake):
    for prompt in ("", "\ud800", [], [300], None, 5, [1, {}], "a" * 64):
        if prompt == "":
            assert intake.request(prompt).prompt == (0,)  # the first token alone is a prompt
            continue
        with pytest.raises(InvalidRequest):
            intake.request(prompt)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        intake.request("a" * 50, SamplingParams())
    with pytest.raises(InvalidRequest, match="request_id"):
        intake.request([1], request_id="")
    with pytest.raises(InvalidRequest, match="priority"):
        intake.request([1], priority=2**31)
    with pytest.raises(InvalidRequest, match="role"):
        intake.request([{"role": "root", "content": ""}])
    with pytest.raises(InvalidRequest, match=r"sampling_params: must be SamplingParams, got \{'n': 1\} \(dict\); make"):
        intake.request([1], {"n": 1})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="prompt: is None; give text"):
        intake.request(None)


def test_a_text_far_too_long_is_refused_before_tokenising(intake, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "encode", None)
    begin = time.monotonic()
    with pytest.raises(InvalidRequest, match="max_model_len"):
        intake.request("a" * 50_000_000)
    assert time.monotonic() - begin < 0.5


def test_without_a_tokenizer_ids_still_work():
    bare = Intake(None, LIMITS)
    assert bare.request([1]).prompt == (1,)
    for prompt in ("text", [{"role": "user", "content": "x"}]):
        with pytest.raises(TokenizerMissing):
            bare.request(prompt)
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        bare.request([1], SamplingParams(stop="x"))
    with pytest.raises(TokenizerMissing, match="chat template"):
        Intake(TOKENIZER, LIMITS).request([{"role": "user", "content": "x"}])


def test_generation_config():
    found = GenerationDefaults.from_config({"eos_token_id": [5, 6, 5], "temperature": 0.6, "top_k": 20, "top_p": None,
                                            "max_new_tokens": 99, "do_sample": True, "repetition_penalty": 1.0})
    assert found == GenerationDefaults(SamplingParams(temperature=0.6, top_k=20, max_tokens=99), (5, 6))
    assert GenerationDefaults.from_config({"eos_token_id": 3}).eos_token_ids == (3,)
    assert GenerationDefaults.from_config({}) == GenerationDefaults()


def test_generation_config_from_a_folder(tmp_path):
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 4, "temperature": "ignored"}))
    assert GenerationDefaults.from_folder(tmp_path).eos_token_ids == (4,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8], "top_p": 0.9}))
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults(SamplingParams(top_p=0.9), (8,))


@pytest.mark.parametrize("config", [
    {"eos_token_id": "x"}, {"eos_token_id": [1.5]}, {"eos_token_id": True}, {"eos_token_id": -1},
    {"eos_token_id": list(range(MAX_STOP_IDS + 1))}, {"temperature": "hot"}, {"top_p": 7}, {"max_new_tokens": 0}])
def test_malformed_generation_config(tmp_path, config):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFormatError) as caught:
        Intake(None, LIMITS, GenerationDefaults.from_folder(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / 'generation_config.json'}: {next(iter(config))} ")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("text", "problem"), [
    ('{"top_p":\n 0.5,}', "is not valid JSON: .*line 2 column [56]"), ("[]", "must hold a JSON object"),
    ('{"eos_token_id": "x"}', "eos_token_id must be"), ('{"eos_token_id": 300}', r"eos_token_id \[300\] is not in")])
def test_a_malformed_file_is_named_with_its_path(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelFormatError, match=problem) as caught:
        Intake(None, LIMITS, GenerationDefaults.from_folder(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
