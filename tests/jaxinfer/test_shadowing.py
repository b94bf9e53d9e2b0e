"""A user's file with the name of one of our packages is said in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer import shadowing

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process in `folder`, which Python searches first, with us found after it as when installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_our_own_packages_are_not_complained_about():
    shadowing.check("serve", "checkpoints", "pallas_kernels")
    assert shadowing.find("no_such_package") is None


@pytest.mark.parametrize("name", ["checkpoints", "pallas_kernels"])
def test_a_script_beside_a_file_of_that_name_gets_one_line(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "mine.py").write_text("from jaxinfer import LLM")
    result = run(tmp_path, "mine.py")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert str(tmp_path / f"{name}.py") in last and "rename it" in last
    assert "ShadowedPackage" in last


def test_a_package_of_that_name_is_found_too(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "__init__.py").write_text("")
    result = run(tmp_path, "-m", "jaxinfer.cli", "generate", "x", "prompt")
    assert result.returncode == 1
    assert result.stderr.startswith(f"jaxinfer: {tmp_path / 'checkpoints'} hides")
    assert result.stderr.count("\n") == 1


def test_a_plain_folder_of_that_name_is_found_where_it_wins(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in [name for name in sys.modules if name.split(".")[0] == "checkpoints"]:
        monkeypatch.delitem(sys.modules, module)
    assert shadowing.find("checkpoints") == tmp_path / "checkpoints"
    with pytest.raises(shadowing.ShadowedPackage, match="hides"):
        shadowing.check("checkpoints")


def test_the_command_serve_refuses_a_users_serve_py(tmp_path):
    (tmp_path / "serve.py").write_text("")
    result = run(tmp_path, "-m", "jaxinfer.cli", "serve")
    assert result.returncode == 1
    assert result.stderr == (
        f"jaxinfer: {tmp_path / 'serve.py'} hides jaxinfer's package 'serve': rename it, or run from another folder\n"
    )


def test_a_users_serve_py_is_a_warning_to_who_only_needs_the_engine(tmp_path):
    (tmp_path / "serve.py").write_text("import jaxinfer; jaxinfer.LLM; print('went on')")
    result = run(tmp_path, "serve.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "went on\n"
    assert f"{tmp_path / 'serve.py'} hides" in result.stderr and result.stderr.count("\n") == 1
