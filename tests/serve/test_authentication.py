"""Tokens over real channels: every RPC that the server itself lists needs one."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from serving import Served, eventually, serving

from jaxinfer.errors import InvalidConfig
from serve.changed_files import ChangedFiles
from serve.client import AsyncClient, Client
from serve.protos.jaxinfer.v1 import generation_pb2
from serve.tokens import Tokens, read_tokens

GOOD, OTHER, WRONG = "search-0123456789abcdef", "assist-0123456789abcdef", "nobody-0123456789abcdef"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
HEALTH = "grpc.health.v1.Health"


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"# ours\nsearch {GOOD}\n\nassist {OTHER}\n")
    return path


@pytest.fixture(scope="module")
def guarded(token_file: Path) -> Iterator[Served]:
    core = make_core(CountingEngine(tokens_per_step=2, pace=0.001))
    with serving(core, connect={"token": GOOD}, token_file=str(token_file)) as found:
        yield found


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


class Bearing(grpc.StreamStreamClientInterceptor):
    """Sends a token with the calls of a client that knows of none."""

    def __init__(self, token: str):
        self._metadata = bearer(token)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(client_call_details._replace(metadata=self._metadata), request_iterator)


def listed(address: str, token: str) -> dict[str, MethodDescriptor]:
    """All RPCs of all services that the running server says it has, by their paths."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, Bearing(token)))
        pool = DescriptorPool(database)
        services = [pool.FindServiceByName(name) for name in database.get_services()]
        return {f"/{service.full_name}/{method.name}": method for service in services for method in service.methods}


def code_of(address: str, path: str, method: Any, metadata: Any) -> grpc.StatusCode:
    """How a call with an empty request ends; one that goes on for ever is cancelled after its first answer."""
    with grpc.insecure_channel(address) as channel:
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        call = getattr(channel, kind)(path)
        request = iter([b""]) if method.client_streaming else b""
        try:
            answers = call(request, metadata=metadata, timeout=5)
            if method.server_streaming:
                next(answers, None)
                answers.cancel()
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined]
    return grpc.StatusCode.OK


def test_every_rpc_needs_a_token_and_only_health_is_open(guarded: Served):
    address = guarded.server.address
    rpcs = listed(address, GOOD)
    services = {path.split("/")[1] for path in rpcs}
    assert services == {"jaxinfer.v1.GenerationService", "jaxinfer.v1.DraftService", HEALTH,
                        "grpc.reflection.v1alpha.ServerReflection", *expected_of_gateways()}
    for path, method in rpcs.items():
        is_open = path.startswith(f"/{HEALTH}/")
        for metadata in (None, bearer(WRONG), bearer(GOOD[:-1]), bearer(GOOD.upper()), bearer(GOOD) + bearer(WRONG)):
            found = code_of(address, path, method, metadata)
            assert found is (grpc.StatusCode.OK if is_open else UNAUTHENTICATED), (path, metadata)
        assert code_of(address, path, method, bearer(GOOD)) is not UNAUTHENTICATED, path


def expected_of_gateways() -> set[str]:
    """The services whose stubs are a package that may be missing."""
    return {"vllm.grpc.engine.VllmEngine"} if find_spec("smg_grpc_proto") is not None else set()


def test_every_method_of_the_stubs_is_among_them(guarded: Served):
    """What is called above is what clients can call."""
    rpcs = listed(guarded.server.address, GOOD)
    wanted = [generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]]
    if expected_of_gateways():
        from smg_grpc_proto import vllm_engine_pb2

        wanted.append(vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"])
    for service in wanted:
        assert {f"/{service.full_name}/{method.name}" for method in service.methods} <= rpcs.keys()


def test_what_is_added_later_and_what_is_not_there_need_one_too(guarded: Served):
    unary = descriptor_pb2.MethodDescriptorProto()
    for path in ("/new.Service/Anything", "/grpc.health.v1.HealthX/Check", "/jaxinfer.v1.GenerationService/Nothing"):
        assert code_of(guarded.server.address, path, unary, None) is UNAUTHENTICATED
        assert code_of(guarded.server.address, path, unary, bearer(GOOD)) is grpc.StatusCode.UNIMPLEMENTED


def test_a_caller_that_sends_nothing_is_refused_too(guarded: Served):
    with grpc.insecure_channel(guarded.server.address) as channel:
        silent = channel.stream_stream("/jaxinfer.v1.DraftService/Draft")(forever(), timeout=5)
        with pytest.raises(grpc.RpcError) as caught:
            next(silent)
    assert caught.value.code() is UNAUTHENTICATED  # type: ignore[attr-defined]


def forever() -> Iterator[bytes]:
    """A stream of requests whose first never comes, until the call has ended."""
    threading.Event().wait(3)
    yield b""


def test_health_answers_without(guarded: Served, caplog: pytest.LogCaptureFixture):
    serving_now = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    with grpc.insecure_channel(guarded.server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest()) == serving_now
        found = stub.List(health_pb2.HealthListRequest()).statuses
    names = {"", "jaxinfer.v1.GenerationService", *expected_of_gateways()}
    assert dict(found) == dict.fromkeys(names, serving_now)
    assert not caplog.records, "who has no token cannot fill the log"


@pytest.mark.parametrize(("value", "words"), [
    (f"Bearer {WRONG}", "not known"), (f"Basic {GOOD}", "not a bearer token"), (GOOD, "not a bearer token"),
    ("Bearer ", "not known"), ("", "not a bearer token"),
])
def test_refusals_say_why_and_repeat_no_token(guarded: Served, value: str, words: str,
                                              caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG", logger="serve")
    with grpc.insecure_channel(guarded.server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/jaxinfer.v1.GenerationService/GetLoad")(b"", metadata=(("authorization", value),))
    text = caught.value.details()  # type: ignore[attr-defined]
    assert words in text
    assert "was refused" in caplog.text
    assert "0123456789abcdef" not in text + caplog.text


def test_clients_send_their_token_with_every_call(guarded: Served):
    client = guarded.client
    client.wait_ready(5)
    assert client.generate("ab", max_tokens=3).text == "cde"
    assert "".join(delta.text for delta in client.stream("ab", max_tokens=3)) == "cde"
    assert client.detokenize(client.tokenize("ab")) == "ab"
    assert client.model_info().name == "counting" and client.load().pages_total

    async def all_calls() -> None:
        async with AsyncClient(guarded.server.address, token=OTHER) as other:
            await other.wait_ready(5)
            assert (await other.generate("ab", max_tokens=3)).text == "cde"
            assert "".join([delta.text async for delta in other.stream("ab", max_tokens=3)]) == "cde"
            assert await other.detokenize(await other.tokenize("ab")) == "ab"
            assert (await other.model_info()).name == "counting" and (await other.load()).pages_total

    guarded.call(all_calls())


def test_the_scheme_is_read_as_http_reads_it(guarded: Served):
    with grpc.insecure_channel(guarded.server.address) as channel:
        call = channel.unary_unary("/jaxinfer.v1.GenerationService/GetLoad")
        assert call(b"", metadata=(("authorization", f"bearer  {GOOD} "),))


def test_tokens_come_and_go_without_a_restart(tmp_path: Path):
    path = tmp_path / "tokens"
    path.write_text(f"search {GOOD}\n")
    core = make_core(CountingEngine(tokens_per_step=2, pace=0.001))
    with serving(core, connect={"token": GOOD}, token_file=str(path)) as served, \
            Client(served.server.address, token=OTHER) as other:
        served.client.load()
        with pytest.raises(grpc.RpcError):
            other.load()
        (tmp_path / "new").write_text(f"search {OTHER}\n")
        os.replace(tmp_path / "new", path)
        eventually(lambda: accepted(other))
        assert not accepted(served.client)


def accepted(client: Client) -> bool:
    try:
        client.load()
    except grpc.RpcError:
        return False
    return True


# ---- the file


def test_a_tenant_may_have_several_tokens(token_file: Path, tmp_path: Path):
    path = tmp_path / "tokens"
    path.write_text(token_file.read_text() + f"search {WRONG}\n")
    tokens = Tokens(path, check_seconds=0.0)
    assert [tokens.tenant_of(one) for one in (GOOD, OTHER, WRONG, "", GOOD + "=")] == [
        "search", "assist", "search", None, None]


def test_a_bad_file_leaves_the_last_tokens_in_force(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "tokens"
    path.write_text(f"search {GOOD}\n")
    tokens = Tokens(path, check_seconds=0.0)
    path.write_text("search short\n")
    assert tokens.tenant_of(GOOD) == "search" and "line 1: the token has 5 characters" in caplog.text
    path.unlink()
    assert tokens.tenant_of(GOOD) == "search" and "cannot read" in caplog.text
    path.write_text(f"assist {OTHER}\n")
    assert tokens.tenant_of(GOOD) is None and tokens.tenant_of(OTHER) == "assist"


def test_a_file_that_becomes_readable_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture):
    """Nothing of the file itself need have changed by then: a folder above it may have been opened, say."""
    path = tmp_path / "tokens"
    path.write_text(f"search {GOOD}\n")
    tokens = Tokens(path, check_seconds=0.0)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", denied)
        path.write_text(f"assist {OTHER}\n")
        assert [tokens.tenant_of(GOOD) for _ in range(3)] == ["search"] * 3
    assert caplog.text.count("the last tokens stay in force: token_file: cannot read") == 1
    assert tokens.tenant_of(GOOD) is None and tokens.tenant_of(OTHER) == "assist"


@pytest.mark.parametrize("mend", [lambda path: path.chmod(0o640), lambda path: os.chown(path, -1, os.getgid())])
def test_other_permissions_are_a_change(tmp_path: Path, mend: Callable[[Path], None]):
    path = tmp_path / "tokens"
    path.touch(0o600)
    files = ChangedFiles((path,))
    assert not files.changed()
    time.sleep(0.01)  # the file's clock has ticks
    mend(path)
    assert files.changed() and not files.changed()


def test_the_file_is_not_looked_at_more_often_than_said(tmp_path: Path):
    path = tmp_path / "tokens"
    path.write_text(f"search {GOOD}\n")
    tokens = Tokens(path, check_seconds=3600.0)
    path.write_text(f"search {OTHER}\n")
    assert tokens.tenant_of(GOOD) == "search"


def test_tokens_are_not_kept(token_file: Path):
    tokens = Tokens(token_file)
    assert GOOD not in repr(vars(tokens)) and GOOD not in repr(read_tokens(token_file))


@pytest.mark.parametrize(("text", "words"), [
    ("", "holds no tokens"), ("# nothing\n\n", "holds no tokens"), (f"{GOOD}\n", "line 1: has 1 words"),
    (f"\na b {GOOD}\n", "line 2: has 3 words"), ("search 0123456789abcde\n", "line 1: the token has 15 characters"),
    (f"search {GOOD}!\n", "line 1: the token has"), (f"../x {GOOD}\n", "line 1: the tenant must be"),
    (f"{'a' * 65} {GOOD}\n", "line 1: the tenant must be"), (f"a {GOOD}\nb {GOOD}\n", "line 2: another tenant"),
    (f"a {'0' * 4097}\n", "4097 characters"),
])
def test_files_that_are_refused(tmp_path: Path, text: str, words: str):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=words) as caught:
        Tokens(path)
    assert str(caught.value).startswith("token_file: ") and "0123456789abcde" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(InvalidConfig, match=r"cannot read .*No such file"):
        Tokens(tmp_path / "tokens")


# ---- the client keeps its token to itself


@pytest.mark.parametrize("address", ["model.example:50051", "10.0.0.1:50051", "[2001:db8::1]:1", "dns:///a.example:1"])
def test_a_token_does_not_cross_a_network_unencrypted(address: str):
    with pytest.raises(ValueError, match="unencrypted") as caught:
        Client(address, token=GOOD)
    assert GOOD not in str(caught.value)
    Client(address, token=GOOD, tls=True).close()
    Client(address, token=GOOD, insecure=True).close()
    Client(address).close()


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/tmp/socket", "dns:///localhost:1"])
def test_a_token_to_this_machine(address: str):
    Client(address, token=GOOD).close()


@pytest.mark.parametrize("token", ["", " ", "a\nb", "ü" * 20])
def test_what_is_no_token(token: str):
    with pytest.raises(ValueError, match="printable ASCII"):
        Client(token=token)
