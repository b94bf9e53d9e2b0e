"""The README's examples run as they stand, and its links lead somewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve.gateway import gateway

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def environment(home: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": str(home), "JAX_PLATFORMS": "cpu"}


def run(code: str, repository: Path, cache: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400, cwd=repository,
                            check=False, env=environment(cache))
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


PYTHON = [example for example in EXAMPLES if "LLM" in example]
GRPC = [example for example in EXAMPLES if "Client" in example]
OPENAI = [example for example in EXAMPLES if "OpenAI" in example]


def test_there_are_few_short_examples_of_each_kind():
    assert len(EXAMPLES) == 5 and len(PYTHON) == len(GRPC) == 2 and len(OPENAI) == 1
    assert all(len(example.strip().splitlines()) <= 10 for example in EXAMPLES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Of a user who runs one example after the other: the first compiles, the others find its programs."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.slow
def test_the_python_examples(repository, home):
    printed = run(PYTHON[0], repository, home)
    assert "def fibonacci(n):" in printed
    assert "(3, 4096)" in printed
    assert "parsed {'red': " in run(PYTHON[1], repository, home)


@pytest.mark.slow
def test_the_grpc_examples(repository, home):
    command = [Path(sys.executable).parent / "jaxinfer", "serve", "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository,
                          env=environment(home)) as server:
        try:
            address = next(found[1] for line in server.stdout if (found := re.search(r"(127\.0\.0\.1:\d+)", line)))
            printed, rules = (run(one.replace("127.0.0.1:50051", address), repository, home) for one in GRPC)
            assert len(printed) > 40
            assert "pages_total" in printed
            assert re.search(r"^number [0-9]{3}-[0-9]{4}\n(yes|no)$", rules, re.MULTILINE)
            if importlib.util.find_spec("smg"):
                with gateway([address]) as front:
                    assert run(OPENAI[0].replace("http://127.0.0.1:30000", front.url), repository, home)
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert server.returncode == 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_to_files(target, repository):
    assert (repository / target).exists()
