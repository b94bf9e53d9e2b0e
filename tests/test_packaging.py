"""What leaves the repository: the wheel, the set-up, the pins, and nothing that belongs to one machine."""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PACKAGES = {"jaxinfer", "pallas_kernels", "checkpoints", "serve"}
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


@pytest.fixture(scope="session")
def tracked(repository: Path) -> list[Path]:
    """Files of the repository: tracked, or not ignored yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("needs the git repository")
    return [path for name in listing.stdout.split("\0") if name and (path := repository / name).is_file()]


@pytest.fixture(scope="session")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def pins(repository: Path) -> dict[str, Version]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


# The wheel.


@pytest.fixture(scope="session")
def wheel(repository: Path, tracked: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the repository."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked:
        copy = source / path.relative_to(repository)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_four_packages_and_all_their_files(wheel, repository, tracked):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    shipped = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in shipped} == PACKAGES
    relative = [path.relative_to(repository) for path in tracked]
    assert shipped == {str(path) for path in relative if path.parts[0] in PACKAGES and len(path.parts) > 1}
    assert any(name.endswith("checkpoints/demo/target/model.safetensors") for name in shipped)


def test_an_installed_wheel_has_a_command_that_runs(wheel, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    jaxinfer = python.with_name("jaxinfer")
    result = subprocess.run([jaxinfer, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"jaxinfer \d+\.\d+\.\d+\n", result.stdout)


# Requirements.


def test_requirements_are_ranges(project):
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        operators = {specifier.operator for specifier in Requirement(text).specifier}
        assert ">=" in operators and not operators & {"==", "===", "~="}, text


def test_pins_cover_everything_that_is_installed(project, pins):
    """Every requirement of a requirement, for this Python and machine, has a pin that its range allows."""
    texts = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    waiting, seen = [Requirement(text) for text in texts], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) not in seen:
            seen |= {str(requirement), name}
            waiting += needed_by(requirement)
        assert name in pins, f"{name} has no pin"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} forbids {pins[name]}"
    assert pins["jax"] == pins["jaxlib"] == Version("0.11.2")
    surplus = sorted(set(pins) - seen)
    assert not surplus, f"pins that nothing needs: {surplus}"


def needed_by(requirement: Requirement) -> list[Requirement]:
    found = [Requirement(text) for text in metadata.requires(requirement.name) or []]
    extras = [{"extra": extra} for extra in ("", *requirement.extras)]
    return [one for one in found if one.marker is None or any(map(one.marker.evaluate, extras))]


def test_generated_code_runs_on_the_oldest_versions_we_allow(repository, project):
    """Generated gRPC code refuses runtimes older than its generator."""
    oldest = {
        Requirement(text).name: min(Version(one.version) for one in Requirement(text).specifier if one.operator == ">=")
        for text in project["dependencies"]
    }
    stubs = repository / "serve/protos/jaxinfer/v1"
    numbers = re.search(r"Domain\.PUBLIC,\s*(\d+),\s*(\d+),\s*(\d+)", (stubs / "generation_pb2.py").read_text())
    assert numbers and oldest["protobuf"] >= Version(".".join(numbers.groups()))
    grpc = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", (stubs / "generation_pb2_grpc.py").read_text())
    assert grpc and oldest["grpcio"] >= Version(grpc[1])


def test_the_python_that_is_asked_for_is_the_same_everywhere(repository, project):
    wanted = (repository / ".python-version").read_text().strip()
    assert project["requires-python"] == f">={wanted}"
    assert f"MIN_PYTHON := {wanted}\n" in (repository / "Makefile").read_text()


HINT = re.compile(r"""pip install (?:-e )?\S*?\[([a-z0-9,{}]+)\\?\]""")


def test_hints_install_extras_that_there_are_from_the_checkout(repository: Path, tracked: list[Path], project: dict):
    """The package is on no index: `pip install NAME[...]` would find nothing, or something that is not ours."""
    hints = [(path.name, match) for path in tracked if path.suffix in {".md", ".py", ".service"}
             for match in HINT.finditer(path.read_text())]
    assert len(hints) >= 10
    assert [(name, match[0]) for name, match in hints if not re.search(r"""["']\\?\.\\?\[""", match[0])] == []
    named = {extra for _, match in hints for extra in match[1].split(",")} - {"{extra}"}
    assert named <= set(project["optional-dependencies"])


# Set-up.


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """As much of a fresh clone as make looks at before it installs."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(repository / name, folder / name)
    return folder


def make(folder: Path, *arguments: str, python: str) -> subprocess.CompletedProcess[str]:
    """Runs make where every Python on the path is the script `python`."""
    fakes = folder.parent / "fakes"
    fakes.mkdir(exist_ok=True)
    for name in ("python", "python3", "python3.12", "python3.13", "python3.14"):
        (fakes / name).write_text(f"#!/bin/sh\n{python}\n")
        (fakes / name).chmod(0o755)
    environment = {"PATH": f"{fakes}:/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


OLD = 'case "$2" in *sys.exit*) exit 1;; *) echo "Python 3.10.13 at /usr/bin/python3";; esac'


@needs_make
@pytest.mark.parametrize(("python", "found"), [(OLD, "Python 3.10.13 at /usr/bin/python3"), ("exit 127", "none")])
def test_an_older_python_gets_one_clear_line(checkout, python, found):
    result = make(checkout, "setup", python=python)
    assert result.returncode != 0
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert f"jaxinfer needs Python 3.12 or newer, found: {found}. Install Python 3.12" in result.stderr
    assert not (checkout / ".venv").exists()


@needs_make
def test_a_second_set_up_reuses_the_first(checkout):
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").write_text("#!/bin/sh\necho Python 3.12.9\n")
    (checkout / ".venv/bin/python").chmod(0o755)
    (checkout / ".venv/installed.stamp").touch()
    result = make(checkout, "setup", python=OLD)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ready: .venv (Python 3.12.9)\n", "")


@needs_make
def test_help_lists_the_targets(checkout):
    result = make(checkout, python=OLD)
    assert {line.split()[1] for line in result.stdout.splitlines()} >= {"setup", "test", "demo", "bench", "lint"}


# Nothing of one machine.

# In pieces, so that this file does not contain what it looks for.
FOREIGN = [
    "/wo" + "rk/", "/fa" + "rm/", "/ro" + r"ot/\.", "index" + "-url", "find" + "-links", "registry" + " = ",
    "farm" + "-[a-z]+", r"\.lib" + "rary", "pypi" + r"\.org", "python" + "hosted", "npmjs" + r"\.",
]  # fmt: skip


def foreign_lines(name: str, text: str) -> list[str]:
    pattern = re.compile("|".join(FOREIGN))
    return [f"{name}: {line.strip()[:120]}" for line in text.splitlines() if pattern.search(line)]


def test_no_file_names_a_machine_or_a_package_host(repository, tracked):
    found = []
    for path in tracked:
        try:
            text = path.read_text()
        except UnicodeDecodeError:  # weights
            continue
        found += foreign_lines(str(path.relative_to(repository)), text)
    assert not found, "\n".join(found)


def test_such_a_line_would_be_found():
    assert len(foreign_lines("x", "fine\n--index" + "-url y\nin /wo" + "rk/z\nnetwork/y")) == 2
