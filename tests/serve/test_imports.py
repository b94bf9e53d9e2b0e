"""What importing costs: users of the client have no accelerator and no patience."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import serve

HEAVY = {"jax", "jaxlib", "numpy", "flax", "tokenizers", "tqdm", "jinja2", "orbax", "rich"}


def modules_after(statement: str, repository: Path) -> set[str]:
    script = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=repository)
    return set(json.loads(found.stdout))


@pytest.mark.parametrize("statement", ["import serve.client", "from serve import AsyncClient, Client, Tls"])
def test_the_client_imports_neither_jax_nor_the_engine(statement: str, repository: Path):
    loaded = modules_after(statement, repository)
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("jaxinfer.")} <= {"jaxinfer.core", "jaxinfer.types"}


def test_the_package_itself_imports_nothing(repository: Path):
    assert not modules_after("import serve", repository) & (HEAVY | {"grpc", "google.protobuf"})


def test_the_server_imports_no_jax(repository: Path):
    assert "jax" not in modules_after("import serve.server", repository)


def test_exported_names():
    assert serve.__all__ == ["AsyncClient", "Client", "Tls"]
    assert all(hasattr(serve, name) for name in serve.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        serve.nothing  # noqa: B018
