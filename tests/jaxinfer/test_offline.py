"""`LLM` as its users call it, on a tiny model with a real tokenizer."""

import asyncio
import math
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from tiny_model import write_tiny_model

from jaxinfer.errors import (
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    ModelFormatError,
    OutOfMemory,
    TokenizerMissing,
)
from jaxinfer.offline import LLM
from jaxinfer.request_limits import RequestLimits
from jaxinfer.types import SamplingParams

SMALL = {"max_model_len": 160, "max_num_seqs": 4, "max_num_batched_tokens": 64, "page_size": 8, "num_pages": 64,
         "max_decode_rounds": 4, "quiet": True}
USER = {"role": "user", "content": "reverse a string"}
PROMPT = "def fibonacci(n):\n    return"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, repository):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", repository / "checkpoints" / "demo" / "target")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder), **SMALL) as llm:
        yield llm


def greedy(**fields):
    return SamplingParams(temperature=0.0, **{"max_tokens": 12, "ignore_eos": True} | fields)


@pytest.mark.smoke
def test_many_prompts_answer_as_each_alone(llm):
    prompts = [PROMPT, "import os", "x = [1, 2, 3]\n", "# a comment about naïve café 漢字\n", "class A:"]
    together = llm.generate(prompts, greedy())
    assert [output.prompt for output in together] == prompts
    for prompt, output in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, greedy())[0]
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert alone.outputs[0].text == output.outputs[0].text
        assert len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].finish_reason == "length"


def test_prompts_may_be_text_ids_or_mappings(llm):
    ids = llm.core.tokenizer.encode(PROMPT)
    forms = [PROMPT, ids, tuple(ids), np.array(ids), {"prompt": PROMPT}, {"prompt_token_ids": ids}]
    outputs = [llm.generate(form, greedy())[0] for form in forms]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert outputs[0].prompt_token_ids == ids
    assert len(llm.generate([ids, ids], greedy())) == 2


def test_each_prompt_may_have_its_own_params(llm):
    outputs = llm.generate([PROMPT, PROMPT], [greedy(max_tokens=3), greedy(max_tokens=5)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 5]
    with pytest.raises(InvalidRequest, match="1 given for 2 prompts"):
        llm.generate([PROMPT, PROMPT], [greedy()])


def test_logits_agree_with_greedy_and_with_logprobs(llm):
    output = llm.generate(PROMPT, greedy(logprobs=3, prompt_logprobs=0))[0]
    answer = output.outputs[0]
    ids = output.prompt_token_ids + answer.token_ids
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), llm.core.info.vocab_size)
    assert logits.dtype == np.float32
    first = len(output.prompt_token_ids) - 1
    np.testing.assert_array_equal(np.argmax(logits[first:-1], axis=1), answer.token_ids)
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    for position, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True), start=first):
        assert len(entry) == 3
        assert entry[token].rank == 1
        assert math.isclose(entry[token].logprob, logprobs[position, token], abs_tol=1e-4)
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        token = output.prompt_token_ids[position + 1]
        assert math.isclose(entry[token].logprob, logprobs[position, token], abs_tol=1e-4)


def test_logits_of_more_tokens_than_a_step_holds(llm):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, llm.core.info.vocab_size, 150).tolist()  # the budget is 64 tokens a step
    whole = llm.logits(ids)
    for length in (1, 63, 64, 65, 149):
        np.testing.assert_allclose(llm.logits(ids[:length]), whole[:length], atol=1e-4)


def test_logits_of_the_whole_length_and_not_of_more(llm):
    ids = np.random.default_rng(1).integers(0, llm.core.info.vocab_size, 161).tolist()
    whole = llm.logits(ids[:160])
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(whole[:150], llm.logits(ids[:150]), atol=1e-4)
    prefix = llm.generate([ids[:159]], greedy(max_tokens=1))[0].outputs[0].token_ids[0]
    assert prefix == whole[158].argmax()
    with pytest.raises(InvalidRequest, match=r"^token_ids: has 161 tokens; the limit is 160 \(max_model_len is 160\)"):
        llm.logits(ids)
    with pytest.raises(InvalidRequest, match=r"^token_ids: is empty"):
        llm.logits([])
    assert llm.core.engine.run(lambda engine: engine.scheduler.pool.num_held) == 0


def test_stream_gives_the_text_of_generate(llm):
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True)
    whole = llm.generate(PROMPT, params)[0].outputs[0]
    deltas = list(llm.stream(PROMPT, params))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert deltas[-1].finish_reason == "length"
    assert not any("\ufffd" in delta.text for delta in deltas[:-1])


def test_async_streams_run_side_by_side(llm):
    async def collect(seed):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=20, ignore_eos=True)
        return "".join([delta.text async for delta in llm.astream(PROMPT, params)])

    async def both():
        return await asyncio.gather(collect(1), collect(2))

    texts = asyncio.run(both())
    for seed, text in zip((1, 2), texts, strict=True):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=20, ignore_eos=True)
        assert text == llm.generate(PROMPT, params)[0].outputs[0].text


@pytest.mark.parametrize("name", ["stream", "astream"])
def test_a_stream_refuses_bad_input_at_the_call(llm, name):
    open_stream = getattr(llm, name)
    for prompt, params, field in ((PROMPT, SamplingParams(top_p=2.0), "top_p"), ("", SamplingParams(), "prompt"),
                                  (None, None, "prompt"), (PROMPT, {"max_tokens": 3}, "sampling_params")):
        with pytest.raises(InvalidRequest, match=f"^{field}: "):
            open_stream(prompt, params)


def test_closing_a_stream_frees_its_pages(llm):
    stream = llm.stream(PROMPT, greedy(max_tokens=100))
    next(stream)
    stream.close()
    assert llm.core.engine.run(lambda engine: engine.scheduler.pool.num_held) == 0


def test_stop_strings_cut_the_text_and_end_the_row(llm):
    whole = llm.generate(PROMPT, greedy(max_tokens=30))[0].outputs[0].text
    stop = whole[8:11]
    assert len(stop) == 3
    request = llm.generate(PROMPT, greedy(max_tokens=100, stop=[stop]))[0]
    times, output = request.metrics, request.outputs[0]
    assert times.finished >= times.first_token >= times.scheduled > 0, "a row ended by a stop string has times, too"
    assert times.num_output_tokens == len(output.token_ids) < 100
    assert output.text == whole[:whole.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    kept = llm.generate(PROMPT, greedy(max_tokens=100, stop=[stop], include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == output.text + stop
    assert llm.core.engine.run(lambda engine: engine.scheduler.pool.num_held) == 0
    assert llm.metrics()["finished"]["stop"] >= 2, "it counts as stopped, not as aborted"


def test_seeds_and_samples(llm):
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8, ignore_eos=True)
    first, again = llm.generate([PROMPT, PROMPT], params)
    texts = [one.token_ids for one in first.outputs]
    assert texts == [one.token_ids for one in again.outputs]
    assert len({tuple(ids) for ids in texts}) == 3
    unseeded = llm.generate([PROMPT] * 2, SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True))
    assert unseeded[0].outputs[0].token_ids != unseeded[1].outputs[0].token_ids


def test_chat_uses_the_models_template(llm):
    messages = [{"role": "user", "content": "reverse a string"}]
    output = llm.chat(messages, greedy())[0]
    assert "reverse a string" in output.prompt
    assert len(llm.chat([messages, messages], greedy())) == 2


def test_metrics_count_what_ran_and_no_compile(llm):
    before = llm.metrics()
    llm.generate([PROMPT] * 3, greedy(max_tokens=5))
    after = llm.metrics()
    assert after["generated_tokens"] - before["generated_tokens"] == 15
    assert after["compiles_after_ready"] == 0


@pytest.mark.parametrize(("prompt", "params", "field"), [
    ("", {}, "prompt"),
    ([], {}, "prompt"),
    ([[5, 10**6]], {}, "prompt"),
    ([[-1]], {}, "prompt"),
    (PROMPT, {"max_tokens": 1000}, "max_tokens"),
    (PROMPT, {"temperature": float("nan")}, "temperature"),
    (PROMPT, {"top_p": 0.0}, "top_p"),
    (PROMPT, {"top_k": -2}, "top_k"),
    (PROMPT, {"min_p": 1.5}, "min_p"),
    (PROMPT, {"stop": [3]}, "stop"),
    (PROMPT, {"logprobs": 21}, "logprobs"),
    ({"text": PROMPT}, {}, "prompt"),
])  # fmt: skip
def test_bad_input_names_its_field_and_the_engine_goes_on(llm, prompt, params, field):
    if prompt == []:
        assert llm.generate(prompt) == []  # no prompts, no outputs
        return
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(prompt, SamplingParams(**params))
    assert field in str(caught.value)
    assert llm.generate(PROMPT, greedy(max_tokens=2))[0].finished


@pytest.mark.parametrize(("method", "arguments", "message"), [
    ("generate", (None,), r"prompts: must be text, token ids, .*, got None \(NoneType\)"),
    ("generate", (5,), "prompts: must be text, token ids, .*, got 5"),
    ("generate", (b"ab",), r"prompt: must be a list of token ids, got b'ab' \(bytes\)"),
    ("generate", ([PROMPT, None],), r"prompts\[1\]: is None; give text"),
    ("generate", (PROMPT, {"max_tokens": 3}), r"sampling_params: .*, got \{'max_tokens': 3\} \(dict\); make it with"),
    ("generate", (PROMPT, 3), "sampling_params: must be SamplingParams, or a list.*, got 3; make it with"),
    ("generate", (PROMPT, "hot"), r"sampling_params: .*, got 'hot' \(str\); make it with"),
    ("generate", (PROMPT, [{"max_tokens": 3}]), r"sampling_params: .*, got \{'max_tokens': 3\} \(dict\); make it with"),
    ("chat", (None,), r"messages: must be a list of messages.*, got None \(NoneType\)"),
    ("chat", ({"role": "user", "content": "hi"},), r"messages: must be a list of messages.*, got \{.* \(dict\)"),
    ("chat", ("hi",), r"messages: must be a list of messages.*, got 'hi' \(str\)"),
    ("logits", (None,), r"token_ids: must be a list of token ids, got None \(NoneType\)"),
])  # fmt: skip
def test_arguments_of_the_wrong_kind_are_refused_by_name(llm, method, arguments, message):
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        getattr(llm, method)(*arguments)


@pytest.mark.parametrize(("method", "inputs", "params", "field"), [
    ("generate", [PROMPT, ""], None, "prompts[1]"),
    ("generate", [PROMPT, {"text": PROMPT}], None, "prompts[1]"),
    ("generate", [PROMPT, [5, 10**6]], None, "prompts[1]"),
    ("generate", [PROMPT, [{"role": "nobody", "content": ""}]], None, "prompts[1][0].role"),
    ("generate", [PROMPT, [5] * 60], SamplingParams(max_tokens=120), "prompts[1].max_tokens"),
    ("generate", [PROMPT] * 2, SamplingParams(top_p=2.0), "top_p"),
    ("generate", [PROMPT] * 2, SamplingParams(prompt_logprobs=-1), "prompt_logprobs"),
    ("generate", [PROMPT] * 2, [SamplingParams(), SamplingParams(top_p=2.0)], "sampling_params[1].top_p"),
    ("generate", [PROMPT] * 2, [SamplingParams(), 3], "sampling_params[1]"),
    ("generate", [""], None, "prompt"),
    ("generate", [PROMPT], [SamplingParams(top_p=2.0)], "top_p"),
    ("chat", [[USER], []], None, "messages[1]"),
    ("chat", [[USER], [{"role": "nobody", "content": ""}]], None, "messages[1][0].role"),
    ("chat", [[USER]] * 2, [SamplingParams(), SamplingParams(n=0)], "sampling_params[1].n"),
])  # fmt: skip
def test_an_error_says_which_of_many_it_is_about(llm, method, inputs, params, field):
    with pytest.raises(InvalidRequest) as caught:
        getattr(llm, method)(inputs, params)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert str(caught.value).count(field) == 1


def test_a_priority_that_all_share_keeps_its_name(llm):
    with pytest.raises(InvalidRequest, match=r"^priority: must be an integer"):
        llm.generate([PROMPT] * 2, priority="high")


def test_one_bad_prompt_of_many_starts_nothing(llm):
    before = llm.metrics()["generated_tokens"]
    with pytest.raises(InvalidRequest):
        llm.generate([PROMPT, ""], greedy())
    assert llm.metrics()["generated_tokens"] == before


def test_an_interrupted_call_ends_its_requests_only(llm, monkeypatch):
    seen = []

    def interrupt(self, *_):
        seen.append(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jaxinfer.offline._Batch._collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT] * 3, greedy(max_tokens=100))
    assert seen
    assert llm.core.engine.run(lambda engine: engine.scheduler.pool.num_held) == 0
    assert llm.generate(PROMPT, greedy(max_tokens=2))[0].finished


def test_more_prompts_than_may_wait_are_fed_as_there_is_room(folder):
    with LLM(str(folder), **SMALL | {"max_waiting": 5, "request_limits": RequestLimits(max_n=2)}) as llm:
        assert all(output.finished for output in llm.generate([PROMPT] * 23, greedy(max_tokens=2)))
        with pytest.raises(InvalidRequest, match=r"n: must be in \[1, 2\], got 3"):
            llm.generate(PROMPT, greedy(n=3))


def test_a_second_llm_in_one_process_and_one_without_a_tokenizer(llm, repository, tmp_path):
    source = repository / "checkpoints" / "demo" / "target"
    folder = write_tiny_model(tmp_path / "ids", source, with_tokenizer=False)
    ids = llm.core.tokenizer.encode(PROMPT)
    with LLM(str(folder), **SMALL) as second:
        output = second.generate([ids], greedy())[0]
        assert output.outputs[0].token_ids == llm.generate([ids], greedy())[0].outputs[0].token_ids
        assert output.outputs[0].text == ""
        with pytest.raises(TokenizerMissing):
            second.generate(PROMPT)
    second.close()  # again: harmless
    for method, argument in (("generate", [ids]), ("generate", []), ("stream", ids), ("astream", ids), ("chat", []),
                             ("logits", ids)):
        with pytest.raises(EngineClosed, match="this LLM is closed; make a new one"):
            getattr(second, method)(argument)
    with pytest.raises(EngineClosed, match="this LLM is closed; make a new one"):
        second.metrics()
    threads = [thread.name for thread in threading.enumerate()]
    assert threads.count("jaxinfer-engine") == 1


@pytest.mark.parametrize(("changes", "error", "words"), [
    ({"model": "no/such/folder"}, ModelFormatError, "no/such/folder"),
    ({"dtype": "float8"}, InvalidConfig, "dtype"),
    ({"max_model_len": 10**6}, InvalidConfig, "max_position_embeddings"),
    ({"speculation": "medusa-9"}, InvalidConfig, "speculation: 'medusa-9' is not one of draft_model, ngram"),
    ({"speculation": "draft_model"}, InvalidConfig, "speculation: 'draft_model' needs draft_model"),
    ({"speculation": "ngram", "draft_model": "demo-draft"}, InvalidConfig, "speculation: 'ngram' .*draft_model="),
    ({"num_pages": 3}, InvalidConfig, "num_pages: 3 pages .*one a row"),
    ({"num_pages": 0}, InvalidConfig, "num_pages: must be"),
    ({"max_num_seqs": 0}, InvalidConfig, "max_num_seqs: must be"),
    ({"max_num_seqs": "4"}, InvalidConfig, "max_num_seqs: must be an integer of at least 1, got '4'"),
    ({"page_size": 0}, InvalidConfig, "page_size: must be"),
    ({"gpu_memory_utilization": float("nan")}, InvalidConfig, "gpu_memory_utilization: must be"),
    ({"gpu_memory_utilization": 1.5}, InvalidConfig, "gpu_memory_utilization: must be"),
    ({"seed": "a"}, InvalidConfig, "seed: must be"),
    ({"enable_prefix_caching": "no"}, InvalidConfig, "enable_prefix_caching: must be True or False, got 'no'"),
    ({"enable_prefix_caching": 1}, InvalidConfig, "enable_prefix_caching: must be True or False, got 1"),
    ({"tokenizer": 5}, InvalidConfig, "tokenizer: must be a string or None, got 5"),
    ({"attention": True}, InvalidConfig, "attention: must be a string or None, got True"),
    ({"compile_cache": False}, InvalidConfig, "compile_cache: must be a string or None, got False"),
    ({"num_pages": 10**9}, OutOfMemory, "room for"),
    ({"page_size": 8, "block_size": 16}, InvalidRequest, "block_size"),
    ({"tensor_parallel_size": 64}, InvalidConfig, "tensor_parallel_size"),
    ({"max_num_batched_tokens": 2}, InvalidConfig, "max_num_batched_tokens"),
    ({"attention": "nonsense"}, InvalidConfig, "nonsense"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_by_name(folder, changes, error, words):
    with pytest.raises(error, match=words):
        LLM(**{"model": str(folder), **SMALL, **changes})


def test_a_lack_of_memory_on_a_cpu_gives_advice_for_a_cpu(llm, folder):
    assert "temporaries" not in llm.report.memory.table()
    with pytest.raises(OutOfMemory, match="free memory of this machine") as caught:
        LLM(str(folder), **SMALL | {"num_pages": 10**9})
    assert "gpu_memory_utilization" not in str(caught.value)


@pytest.mark.parametrize(("name", "text", "problem"), [
    ("tokenizer.json", '{"model":\n {]}', "is not valid JSON: .*line 2 column 3"),
    ("tokenizer_config.json", '{"eos_token": 7}', "eos_token must be"),
    ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template"),
    ("generation_config.json", '{"top_p": 0}', r"top_p must be a finite number in \(0, 1\], got 0"),
    ("config.json", "{\n]", "is not valid JSON: .*line 2 column 1"),
])  # fmt: skip
def test_a_malformed_file_is_named_at_the_start(folder, tmp_path, name, text, problem):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / name).write_text(text)
    for dtype in ("auto", "float32"):
        with pytest.raises(ModelFormatError, match=problem) as caught:
            LLM(str(broken), **SMALL, dtype=dtype)
        where = broken if "chat_template" in text else broken / name
        assert str(caught.value).startswith(f"{where}: ")


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_answers_as_one_device(llm, folder, size):
    """Four shards of a model with two kv heads: they are repeated when loading."""
    with LLM(str(folder), tensor_parallel_size=size, **SMALL) as parallel:
        ids = llm.core.tokenizer.encode(PROMPT)
        np.testing.assert_allclose(parallel.logits(ids), llm.logits(ids), atol=1e-4)
        wanted = llm.generate([PROMPT, "import os"], greedy())
        found = parallel.generate([PROMPT, "import os"], greedy())
        assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in wanted]
        assert parallel.metrics()["compiles_after_ready"] == 0


LEAVES_EARLY = """
from jaxinfer import LLM, SamplingParams
llm = LLM("demo-draft", max_num_seqs=2, max_model_len=64, max_num_batched_tokens=64, quiet=True)
for delta in llm.stream("a", SamplingParams(max_tokens=60, ignore_eos=True)):
    raise SystemExit(3)
"""


def test_a_script_may_end_while_a_request_runs():
    ended = subprocess.run([sys.executable, "-c", LEAVES_EARLY], capture_output=True, text=True, timeout=120,
                           check=False)
    assert (ended.returncode, ended.stderr) == (3, "")
