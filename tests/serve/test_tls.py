"""TLS and client certificates over real connections, and their replacement while the server runs."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from certificates import Authority, Issued
from counting_engine import CountingEngine, make_core
from serving import Served, eventually, serving

from jaxinfer.errors import InvalidConfig
from serve import server_tls
from serve.client import AsyncClient, Client
from serve.client_security import Tls
from serve.server import Server, ServerConfig
from serve.server_tls import ServerTls

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture
def issued(authority: Authority) -> Issued:
    return authority.issue("server")


def over_tls(issued: Issued, tls: Tls, **settings):
    """A server with a certificate, and a client that connects with `tls`."""
    return serving(make_core(CountingEngine(pace=0.001)), connect={"tls": tls}, tls_cert=str(issued.cert),
                   tls_key=str(issued.key), **settings)


@pytest.fixture
def served(issued: Issued) -> Iterator[Served]:
    with over_tls(issued, issued.trusted()) as found:
        yield found


def code_of(address: str, tls: Tls | bool | None) -> grpc.StatusCode | None:
    """How a call of a new connection ends; None if it is answered."""
    with Client(address, tls=tls) as client:
        try:
            client.model_info(timeout=10)
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined]
    return None


def test_an_encrypted_stream(served: Served, issued: Issued):
    assert "".join(delta.text for delta in served.client.stream("ab", max_tokens=3)) == "cde"

    async def asynchronous() -> str:
        async with AsyncClient(served.server.address, tls=issued.trusted()) as client:
            return (await client.generate("ab", max_tokens=3)).text

    assert served.call(asynchronous()) == "cde"


def test_who_does_not_trust_the_server_does_not_talk_to_it(served: Served, stranger: Authority):
    assert code_of(served.server.address, Tls(ca=stranger.cert)) is UNAVAILABLE
    assert code_of(served.server.address, True) is UNAVAILABLE  # the machine's own authorities do not know it
    assert code_of(served.server.address, None) is UNAVAILABLE  # plain text


def test_a_name_beside_the_certificate(served: Served, issued: Issued):
    wrong = dataclasses.replace(issued.trusted(), server_name="elsewhere.example")
    assert code_of(served.server.address, wrong) is UNAVAILABLE


def test_clients_need_a_certificate_of_the_right_authority(issued: Issued, authority: Authority, stranger: Authority):
    good = issued.trusted(authority.issue("client"))
    with over_tls(issued, good, tls_client_ca=str(authority.cert)) as served:
        assert served.client.model_info().name == "counting"
        assert code_of(served.server.address, issued.trusted()) is UNAVAILABLE
        assert code_of(served.server.address, issued.trusted(stranger.issue("client"))) is UNAVAILABLE


def test_a_new_certificate_without_a_restart(served: Served, issued: Issued, stranger: Authority):
    address = served.server.address
    stream = iter(served.client.stream("ab", max_tokens=100_000, ignore_eos=True))
    next(stream)
    issued.replace(stranger.issue("server"))
    assert code_of(address, Tls(ca=stranger.cert)) is None
    assert code_of(address, issued.trusted()) is UNAVAILABLE
    assert next(stream).text  # what is connected stays so


def test_half_replaced_files_leave_the_last_ones_in_force(served: Served, issued: Issued, stranger: Authority,
                                                         caplog: pytest.LogCaptureFixture):
    other = stranger.issue("server")
    shutil.copy(other.cert, issued.cert)  # and not yet its key
    assert code_of(served.server.address, issued.trusted()) is None
    eventually(lambda: "the last certificates stay in force: tls_cert" in caplog.text)
    shutil.copy(other.key, issued.key)
    assert code_of(served.server.address, Tls(ca=stranger.cert)) is None


def test_certificates_that_become_readable_are_read(served: Served, issued: Issued, stranger: Authority,
                                                    monkeypatch: pytest.MonkeyPatch):
    other, read = stranger.issue("server"), Path.read_bytes

    def denied(path: Path) -> bytes:
        if path == issued.key:
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", denied)
        issued.replace(other)
        assert code_of(served.server.address, issued.trusted()) is None
    assert code_of(served.server.address, Tls(ca=stranger.cert)) is None


def test_new_client_authorities_without_a_restart(issued: Issued, authority: Authority, stranger: Authority,
                                                  tmp_path: Path):
    roots = Path(shutil.copy(authority.cert, tmp_path / "roots.pem"))
    ours, theirs = (issued.trusted(one.issue("client")) for one in (authority, stranger))
    with over_tls(issued, ours, tls_client_ca=str(roots)) as served:
        assert code_of(served.server.address, theirs) is UNAVAILABLE
        shutil.copy(stranger.cert, roots)
        assert code_of(served.server.address, theirs) is None
        assert code_of(served.server.address, ours) is UNAVAILABLE


@pytest.fixture(params=["in memory", "on disk"])
def way_to_check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "on disk":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system has no files in memory")


@pytest.mark.usefixtures("way_to_check")
def test_what_is_checked_is_what_is_used(issued: Issued, stranger: Authority, monkeypatch: pytest.MonkeyPatch):
    """The files are replaced between two reads: the key is the old one and the certificate is new."""
    other, read = stranger.issue("server"), server_tls._bytes

    def replaced_meanwhile(field: str, path: Path) -> bytes:
        data = read(field, path)
        issued.replace(other)
        return data

    ServerTls(issued.cert, issued.key)
    monkeypatch.setattr(server_tls, "_bytes", replaced_meanwhile)
    with pytest.raises(InvalidConfig, match="are not a PEM certificate and its private key"):
        ServerTls(issued.cert, issued.key)
    ServerTls(issued.cert, issued.key)


# ---- what cannot be used is said before anything listens


@pytest.mark.usefixtures("way_to_check")
def test_files_that_cannot_be_used(issued: Issued, authority: Authority, tmp_path: Path):
    other, text = authority.issue("other"), tmp_path / "text.pem"
    text.write_text("no certificate")
    with pytest.raises(InvalidConfig, match=r"^tls_cert: .* are not a PEM certificate and its private key"):
        ServerTls(issued.cert, other.key)
    with pytest.raises(InvalidConfig, match=r"^tls_cert: .*text\.pem"):
        ServerTls(text, issued.key)
    with pytest.raises(InvalidConfig, match=r"^tls_key: cannot read .*missing"):
        ServerTls(issued.cert, tmp_path / "missing")
    with pytest.raises(InvalidConfig, match=r"^tls_client_ca: .* holds no PEM certificates"):
        ServerTls(issued.cert, issued.key, text)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "myhost", "10.0.0.1", "::ffff:10.0.0.1"])  # noqa: S104
def test_other_machines_only_with_tls(host: str):
    with pytest.raises(InvalidConfig, match=r"^host: .*--tls-cert and --tls-key, or --insecure"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, insecure=True).warnings()
    encrypted = ServerConfig(host=host, tls_cert="c", tls_key="k")
    assert "anyone who can reach" in encrypted.warnings()[0]
    assert not dataclasses.replace(encrypted, token_file="t").warnings()  # noqa: S106


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_without_tls(host: str):
    assert not ServerConfig(host=host).warnings()


@pytest.mark.parametrize(("options", "words"), [
    ({"tls_cert": "c"}, "tls_key: is missing"), ({"tls_key": "k"}, "tls_cert: is missing"),
    ({"tls_client_ca": "a"}, "tls_client_ca: .* needs TLS"),
    ({"tls_cert": "c", "tls_key": "k", "insecure": True}, "insecure: .* leave out one"),
])
def test_settings_that_do_not_go_together(options: dict, words: str):
    with pytest.raises(InvalidConfig, match=words):
        ServerConfig(**options)


def test_a_missing_file_is_said_before_the_server_binds(tmp_path: Path):
    async def make() -> None:
        Server(ServerConfig(tls_cert=str(tmp_path / "c"), tls_key=str(tmp_path / "k")))

    with serving(None) as served, pytest.raises(InvalidConfig, match="cannot read"):
        served.call(make())


def test_a_client_certificate_needs_its_key():
    with pytest.raises(ValueError, match="both cert and key"):
        Tls(cert="c")
