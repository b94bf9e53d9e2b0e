"""`LLM` with int8 weights and int8 pages: what holds of other models holds of these, and wrong wishes are refused."""

import jax
import pytest
from tiny_model import write_tiny_model

from jaxinfer import conversion
from jaxinfer.errors import InvalidConfig
from jaxinfer.offline import LLM
from jaxinfer.types import SamplingParams

SMALL = {
    "max_model_len": 128,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 32,
    "page_size": 8,
    "num_pages": 20,
    "max_decode_rounds": 4,
    "quiet": True,
}
PROMPT = "def fibonacci(n):\n    return"
SHARED = "import os\nimport sys\nimport json\n\n\ndef read(path):\n    with open(path) as file:\n        return file."


@pytest.fixture(scope="module")
def folder(tmp_path_factory, repository):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", repository / "checkpoints" / "demo" / "target")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder), quantization="int8", kv_cache_dtype="int8", **SMALL) as llm:
        yield llm


def greedy(**fields):
    return SamplingParams(temperature=0.0, **{"max_tokens": 12, "ignore_eos": True} | fields)


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_rows_answer_together_as_alone_and_from_cached_pages(llm):
    prompts = [PROMPT, SHARED, SHARED + "read()"]
    together = llm.generate(prompts, greedy())
    again = llm.generate(prompts, greedy())
    assert tokens_of(again) == tokens_of(together) == [tokens_of(llm.generate(one, greedy()))[0] for one in prompts]
    assert again[2].num_cached_tokens >= 16


def test_preempted_rows_answer_as_if_they_had_not_been(llm):
    """Three rows that grow to 9 pages each in a pool of 20."""
    prompts = [PROMPT, "class A:", "x = 1\n"]
    alone = [tokens_of(llm.generate(one, greedy(max_tokens=60)))[0] for one in prompts]
    before = llm.metrics()["preemptions"]
    assert tokens_of(llm.generate(prompts, greedy(max_tokens=60))) == alone
    assert llm.metrics()["preemptions"] > before


def test_the_start_reports_what_it_chose(llm):
    named = dict(llm.report.implementations)
    assert named == {"attention": "xla", "int8 matmul, 2 to 32 rows": "xla"}
    # 2 layers, keys and values, 8 tokens, 2 heads of 16 numbers of a byte each.
    assert llm.report.memory.bytes_per_page == 2 * 2 * 8 * 2 * 16
    assert llm.core.info.num_parameters == 4096 * 32 + 32 + 2 * (32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48 + 64)


REFUSED = {
    "an unknown quantization": ({"quantization": "int4"}, r"^quantization: 'int4' is not one of int8, int8_w"),
    "an unknown page dtype": ({"kv_cache_dtype": "int4"}, r"^kv_cache_dtype: 'int4' is not one of auto, .* int8, fp8"),
    "a matmul without int8 weights": ({"int8_matmul": "xla"}, r"^int8_matmul: 'xla', but no weight is int8"),
    "a matmul that does not exist": (
        {"int8_matmul": "cublas", "quantization": "int8"}, r"^int8_matmul: .*'cublas' is not one of .*xla"
    ),
    "a matmul of another device": (
        {"int8_matmul": "tpu", "quantization": "int8"}, r"^int8_matmul: tpu cannot.*\n  tpu: runs on .* \(for down .*"
    ),
    "an attention of another device": ({"attention": "tpu"}, r"^attention: .*\n  tpu: runs on TPUs, this is cpu; .*"),
    "an attention on the host": ({"attention": "reference"}, r"^attention: .*\n  reference: computes .* on the host"),
    "a matmul on the host": (
        {"int8_matmul": "reference", "quantization": "int8"}, r"^int8_matmul: reference cannot.*\n  reference: computes"
    ),
    "an attention that does not exist": ({"attention": "flash"}, r"^attention: .*'flash' is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="names what a CPU refuses")
def test_what_cannot_be_is_refused_before_anything_is_loaded(folder, name, monkeypatch):
    from jaxinfer import loading

    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: pytest.fail("was loaded"))
    options, problem = REFUSED[name]
    with pytest.raises(InvalidConfig, match=problem):
        LLM(str(folder), **SMALL | options)


def test_a_converted_model_starts_as_it_was_converted(folder, llm, tmp_path, capsys):
    conversion.convert(folder, tmp_path / "int8", quantization="int8", with_kv_ranges=True)
    with pytest.raises(InvalidConfig, match="was converted with 'int8'; leave it out"):
        LLM(str(tmp_path / "int8"), quantization="int8_weight_only", **SMALL)
    capsys.readouterr()
    with LLM(str(tmp_path / "int8"), kv_cache_dtype="int8", **SMALL | {"quiet": False}) as converted:
        assert tokens_of(converted.generate(PROMPT, greedy())) == tokens_of(llm.generate(PROMPT, greedy()))
    said = capsys.readouterr().out
    assert "weights: int8, pages: int8" in said and "int8 matmul, 2 to 32 rows  xla" in said
    assert "measured the ranges" not in said
