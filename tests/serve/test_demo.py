"""The demo from start to clean stop, with the counting service in the place of the model's."""

import io
import os
import sys
import tomllib
from pathlib import Path

import pytest

from serve import demo, demo_view
from serve.answers import Delta


@pytest.fixture(autouse=True)
def short_and_importable(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(demo, "SAMPLING", {"max_tokens": 60})  # 0.6 s, in which all rows are seen at once
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]))


def command(load_seconds: float) -> tuple[str, ...]:
    return (sys.executable, str(Path(__file__).with_name("serve_counting.py")), str(load_seconds), "5")


def test_eight_prompts_and_a_table(capfd: pytest.CaptureFixture[str]):
    assert demo.main(command(0)) == 0
    shown = capfd.readouterr().out
    assert "  ready on 127.0.0.1:" in shown
    assert "1 | def fibonacci(n):" in shown and "8 | def read_file(path):" in shown
    assert "TTFT" in shown and "prefix hits: " in shown and "of 64 pages used, 8 rows at once" in shown
    assert "480 tokens in " in shown  # 8 prompts of 60 tokens
    assert "  stopping; running requests get 5 s" in shown
    assert shown.endswith("the service has stopped cleanly\n")


def test_a_service_that_does_not_start(capfd: pytest.CaptureFixture[str]):
    assert demo.main(command(-1)) == 1
    assert "demo: the service ended with exit code 1 before it was ready" in capfd.readouterr().err


def test_a_service_that_does_not_answer(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "WAIT_SECONDS", 0.3)
    script = "import time; print('ready on 127.0.0.1:1: x', flush=True); time.sleep(60)"
    assert demo.main((sys.executable, "-c", script), prompts=()) == 1
    assert "demo: 127.0.0.1:1 was not ready" in capfd.readouterr().err


@pytest.mark.parametrize(("is_terminal", "kind"), [(True, demo_view.LiveView), (False, demo_view.PlainView)])
def test_the_live_view_is_for_terminals(is_terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert type(demo_view.make_view(["a"])) is kind


def test_what_the_live_view_needs_is_installed_with_us(repository: Path):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert any(text.startswith("rich>=") for text in project["dependencies"])


def test_the_live_view_fits_the_terminal():
    output = io.StringIO()
    view = demo_view.LiveView(["def a():\n", "b"] * 4, file=output, width=100, height=41, force_terminal=True)
    with view:
        for number in range(8):
            view.update(number, Delta(number, "    return 1\n" * 30, ()))
        view.update(0, Delta(0, "\n[bold]last line", (), "length"))
    view.table(("prompt", "tokens"), [("a", "3")], ["total: 3"])
    shown = output.getvalue()
    assert "[bold]last line" in shown and "length" in shown and "total: 3" in shown
    with view._console.capture() as capture:
        view._console.print(view._panels())
    assert len(capture.get().splitlines()) == 40
