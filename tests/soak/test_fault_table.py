"""Every test that serve/FAULTS.md names is there, and every soak loop has a row."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`((?:tests/)[\w/]+\.py)::(\w+)`")


@pytest.fixture(scope="module")
def named() -> set[tuple[str, str]]:
    return set(NAMED.findall((ROOT / "serve/FAULTS.md").read_text()))


def names_in(path: Path) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))


def test_the_named_tests_exist(named: set[tuple[str, str]]):
    assert len(named) > 20
    assert [f"{path}::{name}" for path, name in sorted(named) if name not in names_in(ROOT / path)] == []


def test_every_soak_loop_has_a_row(named: set[tuple[str, str]]):
    loops = {(f"tests/soak/{path.name}", name) for path in Path(__file__).parent.glob("test_*.py")
             for name in names_in(path) if path != Path(__file__)}
    assert loops and loops <= named
