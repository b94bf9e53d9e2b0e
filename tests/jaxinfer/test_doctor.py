"""The doctor says what is there, and is loud about an accelerator that nobody uses."""

import json
from pathlib import Path

import pytest

from jaxinfer import cli, doctor

TPU, GPU, SOUND = ("0x1ae0", "0x120000"), ("0x10de", "0x030200"), ("0x10de", "0x040300")


@pytest.mark.parametrize(
    ("backend", "pci", "platforms", "words"),
    [
        ("cpu", [TPU], "", 'a TPU is present but jax runs on the CPU: pip install "jaxinfer[tpu]"'),
        ("cpu", [SOUND, GPU], "", 'pip install "jaxinfer[cuda13]"'),
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
    assert any("cannot read the shape" in warning for warning in warnings)
    assert any("open to other users" in warning for warning in warnings)


def test_the_report(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_COMPILE_CACHE", str(tmp_path / "cache"))
    findings = doctor.examine(str(model_folder))
    text = findings.text()
    for words in ("jaxlib", "cores", "attention, decode", "chosen", "entries"):
        assert words in text
    assert findings.as_dict()["devices"]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with as much of a model as the doctor looks at."""
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path
