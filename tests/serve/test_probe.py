"""The health probe's exit codes, against real servers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import Authority
from counting_engine import CountingEngine, make_core
from serving import Served, serving

from serve.probe import main

TOKEN = "0123456789abcdef"  # noqa: S105 (of this test alone)


def probed(address: str, *arguments: str | Path) -> int:
    return main(["--address", address, "--timeout", "5", *map(str, arguments)])


def test_serving_is_0(served: Served, capsys: pytest.CaptureFixture[str]):
    assert probed(served.server.address) == 0
    assert capsys.readouterr().out == f"{served.server.address}: SERVING\n"
    assert probed(served.server.address, "--service", "jaxinfer.v1.GenerationService") == 0


def test_an_unknown_service_is_1(served: Served, capsys: pytest.CaptureFixture[str]):
    assert probed(served.server.address, "--service", "nobody") == 1
    assert "NOT_FOUND" in capsys.readouterr().err


def test_loading_and_stopped_are_1(capsys: pytest.CaptureFixture[str]):
    with serving(None) as served:
        assert probed(served.server.address) == 1
        assert capsys.readouterr().err == f"{served.server.address}: NOT_SERVING\n"
    assert probed(served.server.address) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_one_that_never_answers_is_1(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert main(["--address", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.3"]) == 1
    assert "DEADLINE_EXCEEDED" in capsys.readouterr().err


def test_no_token_is_needed(tmp_path: Path):
    (tmp_path / "tokens").write_text(f"acme {TOKEN}\n")
    with serving(make_core(CountingEngine(pace=0.001)), token_file=str(tmp_path / "tokens")) as served:
        assert probed(served.server.address) == 0


def test_tls_and_client_certificates(tmp_path: Path):
    authority = Authority(tmp_path, "ours")
    server, client = authority.issue("server"), authority.issue("client")
    with serving(make_core(CountingEngine(pace=0.001)), connect={"tls": server.trusted(client)},
                 tls_cert=str(server.cert), tls_key=str(server.key), tls_client_ca=str(authority.cert)) as served:
        trusted = ("--tls-ca", authority.cert, "--tls-cert", client.cert, "--tls-key", client.key)
        assert probed(served.server.address, *trusted) == 0
        assert probed(served.server.address, *trusted, "--server-name", "elsewhere.example") == 1
        assert probed(served.server.address, "--tls-ca", authority.cert) == 1  # it asks for a certificate
        assert probed(served.server.address, "--tls") == 1  # the machine's authorities do not know the server
        assert probed(served.server.address) == 1


@pytest.mark.parametrize("arguments", [
    ["--tls-cert", "a.pem"], ["--tls-ca", "/nobody/ca.pem"], ["--timeout", "0"], ["--timeout", "nan"], ["--tim", "1"],
    ["127.0.0.1:1"]])
def test_wrong_usage_is_2(arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("words", [["--tls-ca", "TEXT"], ["--tls-cert", "CERT", "--tls-key", "TEXT"]])
def test_files_that_are_no_pem_are_wrong_usage(words: list[str], tmp_path: Path, repository: Path):
    """In a process of its own, whose standard error has what gRPC's core says too."""
    (tmp_path / "TEXT").write_text("no certificate")
    (tmp_path / "CERT").write_bytes(Authority(tmp_path, "ours").cert.read_bytes())
    places = [str(tmp_path / word) if word.isupper() else word for word in words]
    done = subprocess.run([sys.executable, "-m", "serve.probe", "--address", "127.0.0.1:1", *places], cwd=repository,
                          env={**os.environ, "PYTHONPATH": str(repository)}, timeout=60, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("python -m serve.probe: error: ") and "TEXT" in last and "PEM" in last
    assert done.stderr.startswith("usage: ") and ".cc:" not in done.stderr


def test_as_a_command_it_is_light(served: Served, repository: Path):
    script = ("import sys\nfrom serve.probe import main\ncode = main(sys.argv[1:])\n"
              "sys.exit(code or 3 * bool({'jax', 'numpy'} & set(sys.modules)))")
    for command in (["-m", "serve.probe"], ["-c", script]):
        done = subprocess.run([sys.executable, *command, "--address", served.server.address], cwd=repository,
                              env={**os.environ, "PYTHONPATH": str(repository)}, timeout=60, check=False)
        assert done.returncode == 0
