"""The doctor says what is there, and is loud about an accelerator that nobody uses."""

import json
from pathlib import Path

import pytest

from jaxinfer import cli, doctor

TPU, GPU, SOUND = ("0x1ae0", "0x120000"), ("0x10de", "0x030200"), ("0x10de", "0x040300")


@pytest.mark.parametrize(
    ("backend", "pci", "platforms", "words"),
    [
        ("cpu", [TPU], "", "a TPU is present but jax runs on the CPU: pip install '.[tpu]'"),
        ("cpu", [SOUND, GPU], "", "pip install '.[cuda13]'"),
        ("cpu", [TPU], "cpu", "JAX_PLATFORMS=cpu keeps jax on the CPU"),
        ("cpu", [SOUND], "", None),
        ("cpu", [], "", None),
        ("tpu", [TPU], "", None),
        ("gpu", [GPU], "cuda", None),
    ],
)
def test_an_unused_accelerator_is_a_warning(backend, pci, platforms, words):
    warnings = doctor.unused_accelerators(backend, pci, platforms)
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]


def test_pci_devices(tmp_path):
    for number, (vendor, kind) in enumerate([TPU, SOUND]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    (tmp_path / "broken").mkdir()
    assert doctor.pci_devices(tmp_path) == [TPU, SOUND]
    assert doctor.pci_devices(tmp_path / "missing") == []


def test_an_unknown_model_and_an_open_cache_are_warnings(tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    monkeypatch.setenv("JAXINFER_COMPILE_CACHE", str(cache))
    assert cli.main(["doctor", "--model", str(tmp_path / "missing"), "--json"]) == 1
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("cannot tell what would run" in warning for warning in warnings)
    assert any("open to other users" in warning for warning in warnings)


def test_the_report(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_COMPILE_CACHE", str(tmp_path / "cache"))
    findings = doctor.examine(str(model_folder))
    text = findings.text()
    for words in ("jaxlib", "cores", "attention, decode", "chosen", "entries"):
        assert words in text
    assert findings.as_dict()["devices"]
    run = findings.as_dict()[f"what would run ({model_folder})"]
    assert run["int8 matmul, 64 rows: xla"] == run["int8_weight_only matmul, 1 rows: xla"] == "chosen"
    assert run["attention, verification: reference"].startswith("computes with concrete arrays on the host")


def test_options_change_what_would_run(model_folder, capsys, monkeypatch):
    monkeypatch.setenv("JAXINFER_COMPILE_CACHE", "off")
    words = ["doctor", str(model_folder), "--json", "--quantization", "int8"]
    cli.main([*words, "--kv-cache-dtype", "fp8"])
    run = json.loads(capsys.readouterr().out)[f"what would run ({model_folder})"]
    assert not any(name.startswith("int8_weight_only") for name in run)
    assert cli.main([*words, "--kv-cache-dtype", "fp7"]) == 1
    assert "'fp7' is not one of auto" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--tensor-parallel-size", "64"], "would not start: tensor_parallel_size: must be 1 to "),
        (["--attention", "reference"], "would not start: attention: reference cannot serve this model"),
        (["--quantization", "int8", "--int8-matmul", "cublas"], "would not start: int8_matmul: "),
    ],
)
def test_what_a_start_would_refuse_is_a_warning(words, problem, model_folder, capsys, monkeypatch):
    monkeypatch.setenv("JAXINFER_COMPILE_CACHE", "off")
    assert cli.main(["doctor", str(model_folder), "--json", *words]) == 1
    assert [warning for warning in json.loads(capsys.readouterr().out)["warnings"] if problem in warning]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with as much of a model as the doctor looks at."""
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256,
              "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path
