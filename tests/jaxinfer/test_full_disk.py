"""`jaxinfer convert` on a disk that takes no more: it says so, leaves nothing half, and what was there still loads."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from checkpoints import orbax_store
from jaxinfer import cli
from jaxinfer.loading import load_model

LIMITED = """
import resource, sys
from jaxinfer import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(cli.main(["convert", *sys.argv[2:]]))
"""
"""A file may grow to so many bytes; each write beyond that fails, of Python and of TensorStore's own threads alike."""


@pytest.fixture
def source(repository: Path) -> Path:
    return repository / "tests" / "data" / "parity" / "qwen2-bias"


def convert_within(num_bytes: int, source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LIMITED, str(num_bytes), str(source), str(target)], check=False,
                          capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("num_bytes", [100, 900, 5_000, 60_000],
                         ids=["config", "what Orbax says of itself", "arrays", "more of them"])
def test_a_write_that_fails_is_told_and_leaves_nothing(num_bytes: int, source: Path, tmp_path: Path):
    """Before our line there may be those of Orbax's threads, which print what they meet."""
    done = convert_within(num_bytes, source, tmp_path / "target")
    assert done.returncode == 1, done.stdout + done.stderr
    _, found, line = done.stderr.partition(f"jaxinfer: {tmp_path}" if num_bytes > 100 else "jaxinfer: ")
    assert found and "File too large" in line.partition("\n")[0], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(source: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(orbax_store, "save", lambda *_, **__: pytest.fail("it was begun"))
    assert cli.main(["convert", str(source), str(tmp_path / "target")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxinfer: {tmp_path}: the model may need 0.00") and "0.000 GB are free" in line
    assert list(tmp_path.iterdir()) == []


def test_with_room_it_is_written(source: Path, tmp_path: Path):
    """The limit is what made it fail, and an older one stays as it was."""
    done = convert_within(2**30, source, tmp_path / "target")
    assert done.returncode == 0, done.stderr
    assert convert_within(5_000, source, tmp_path / "second").returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert orbax_store.is_store(tmp_path / "target")
    assert load_model(tmp_path / "target").params
