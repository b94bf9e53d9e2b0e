"""Regenerates the stubs beside all `.proto` files: `python -m serve.protos.generate` (needs the network once).

The stubs are made by one fixed, old grpcio-tools: generated code refuses runtimes older than its generator, and
protobuf serves generated code of its own major version and of the one before. So an old generator is what lets the
client run in environments that bring their own protobuf and grpcio. It lives in a throw-away virtual environment,
since it cannot share one with a new protobuf.
"""

import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

GENERATOR = "1.72.2"
"""grpcio-tools that makes the stubs; they then need grpcio >= this and protobuf >= 6.30.0, < 8."""

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the packages: protoc names imports after paths below it, here `serve.protos...`."""

PROTOS = ("serve/protos/jaxinfer/v1/generation.proto", "jaxinfer/protos/v1/draft.proto")
"""The second is the engine's own contract with a drafter: `jaxinfer` calls that service and may not import `serve`."""


def protoc(python: str | Path, *arguments: str) -> None:
    """Runs the protoc of `python`'s grpcio-tools on our files. Raises CalledProcessError."""
    command = [str(python), "-m", "grpc_tools.protoc", f"-I{ROOT}", *arguments, *(str(ROOT / name) for name in PROTOS)]
    subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603 - all of it is ours


def generate(python: str | Path, out: Path) -> None:
    """Writes the stubs below `out`."""
    protoc(python, f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}")


def installed() -> str | None:
    """Version of the grpcio-tools of this interpreter, None without one."""
    try:
        return metadata.version("grpcio-tools")
    except metadata.PackageNotFoundError:
        return None


def fresh_generator(folder: Path) -> Path:
    """A virtual environment in `folder` with the fixed generator; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", f"grpcio-tools=={GENERATOR}"],  # noqa: S603 - all of it is ours
                   check=True)
    return python


def main() -> None:
    if installed() == GENERATOR:
        generate(sys.executable, ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(fresh_generator(Path(folder)), ROOT)


if __name__ == "__main__":
    main()
