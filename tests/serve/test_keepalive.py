"""Clients whose network is gone without a word: nothing is closed, nothing is answered, and nothing arrives."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from counting_engine import CountingEngine, make_core
from serving import eventually, serving

from jaxinfer import draft_client
from jaxinfer.draft_client import DraftClient
from serve import server_config
from serve.client import Client

KEEPALIVE = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
SHORT_MS = 300
"""In place of a minute, and of 20 s twice."""


class Cable:
    """A way to a server that can be cut: both ends' connections stay, and what either sends is lost."""

    def __init__(self, address: str):
        self._host, _, self._port = address.rpartition(":")
        self._sockets: list[socket.socket] = []
        self._is_cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def _start(self, target, *args) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._host, int(self._port)))
                self._sockets += [client, server]
                self._start(self._carry, client, server)
                self._start(self._carry, server, client)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._is_cut:
                    target.sendall(data)

    def cut(self) -> None:
        self._is_cut = True

    def mend(self) -> None:
        """For new connections; the old ones have lost what was sent meanwhile."""
        self._is_cut = False

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            each.close()


@pytest.fixture(params=[server_config], ids=["server"])
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of a server, or of who calls a drafter, with shorter times."""
    options = request.param.CHANNEL_OPTIONS
    assert set(KEEPALIVE) <= dict(options).keys()
    monkeypatch.setattr(request.param, "CHANNEL_OPTIONS", tuple(
        (name, SHORT_MS if name in KEEPALIVE else value) for name, value in options))


@contextlib.contextmanager
def cable_to(address: str) -> Iterator[Cable]:
    cable = Cable(address)
    try:
        yield cable
    finally:
        cable.close()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("writes", [False, True], ids=["quiet", "under way"])
def test_a_client_without_a_network_gives_its_rows_back(writes: bool):
    """Whether the engine has something for it or not; others go on."""
    core = make_core(CountingEngine(pace=0.01 if writes else None))
    with serving(core) as served, cable_to(served.server.address) as cable, Client(cable.address) as far:
        stream = far.stream("a", max_tokens=100_000, n=3, request_id="far", ignore_eos=True)
        eventually(lambda: len(served.engine.rows) == 3)
        if writes:
            next(iter(stream))
        near = served.client.stream("a", max_tokens=100_000, request_id="near", ignore_eos=True)
        eventually(lambda: len(served.engine.rows) == 4)
        cable.cut()
        eventually(lambda: served.engine.cancelled == [("far", None)], timeout=20)
        assert len(served.engine.rows) == 1
        near.cancel()
        stream.cancel()


@pytest.mark.usefixtures("short")
def test_a_client_with_a_network_is_left_alone_however_quiet():
    core = make_core(CountingEngine())
    with serving(core) as served, cable_to(served.server.address) as cable, Client(cable.address) as far:
        stream = far.stream("a", max_tokens=9, request_id="far", ignore_eos=True)
        eventually(lambda: len(served.engine.rows) == 1)
        threading.Event().wait(4 * SHORT_MS / 1000)
        assert not served.engine.cancelled
        for _ in range(9):
            served.engine.step()
        assert sum(len(delta.token_ids) for delta in stream) == 9


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("short", [draft_client], ids=["drafts"], indirect=True)
def test_a_drafter_without_a_network_is_noticed_and_found_again():
    with serving(make_core(CountingEngine(pace=0.01))) as served, cable_to(served.server.address) as cable:
        drafts = DraftClient(cable.address, num_wanted=4)
        try:
            drafts.tell(1, 0, [1, 2, 3])
            eventually(drafts.take)
            cable.cut()
            eventually(lambda: not drafts.is_alive, timeout=20)
            cable.mend()
            eventually(lambda: drafts.is_alive, timeout=20)
        finally:
            drafts.close()
