"""The README's examples run as they stand, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def environment(home: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": str(home), "JAX_PLATFORMS": "cpu"}


def run(code: str, repository: Path, cache: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400, cwd=repository,
                            check=False, env=environment(cache))
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_there_are_two_short_examples():
    assert len(EXAMPLES) == 2
    assert all(len(example.strip().splitlines()) <= 10 for example in EXAMPLES)


@pytest.mark.slow
def test_the_python_example(repository, tmp_path):
    printed = run(EXAMPLES[0], repository, tmp_path)
    assert "def fibonacci(n):" in printed
    assert "(3, 4096)" in printed


@pytest.mark.slow
def test_the_grpc_example(repository, tmp_path):
    command = [Path(sys.executable).parent / "jaxinfer", "serve", "demo", "--port", "0", "--max-num-seqs", "2",
               "--max-model-len", "512"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository,
                          env=environment(tmp_path)) as server:
        try:
            address = next(found[1] for line in server.stdout if (found := re.search(r"(127\.0\.0\.1:\d+)", line)))
            printed = run(EXAMPLES[1].replace("127.0.0.1:50051", address), repository, tmp_path)
            assert len(printed) > 40
            assert "pages_total" in printed
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert server.returncode == 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_to_files(target, repository):
    assert (repository / target).exists()
