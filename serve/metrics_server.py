"""The port of the metrics: GET /metrics over HTTP, in threads of its own.

The standard library's server is enough for a scrape every few seconds. It never waits for the engine or the event loop,
and neither waits for it; a client that is slow or sends nothing holds one of few connections, for a few seconds in all.
"""

import contextlib
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxinfer.errors import InvalidConfig
from serve.exposition import CONTENT_TYPE
from serve.loopback import is_loopback
from serve.server_config import ServerConfig
from serve.server_tls import ServerTls

PATH = "/metrics"
TIMEOUT_SECONDS = 5.0
"""What a connection gets, handshake and answer together, however it spends it."""
MAX_CONNECTIONS = 16
"""Served at once; more are closed unanswered."""
POLL_SECONDS = 0.2
"""How soon `close` is noticed, and a connection's time that is up."""


class MetricsServer:
    """Serves what `text` gives, from `start` until `close`. tls: used where other machines may connect."""

    def __init__(self, config: ServerConfig, text: Callable[[], str], tls: ServerTls | None):
        self._config = config
        self._text = text
        self._tls = None if is_loopback(config.metrics_host) else tls
        self._server: Listener | None = None

    @property
    def port(self) -> int:
        return self._server.server_address[1] if self._server is not None else 0

    @property
    def url(self) -> str:
        host = self._config.metrics_host
        name = f"[{host}]" if ":" in host else host
        return f"{'http' if self._tls is None else 'https'}://{name}:{self.port}{PATH}"

    def start(self) -> None:
        """Raises InvalidConfig where the port cannot be had."""
        host, port = self._config.metrics_host, self._config.metrics_port or 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._server = Listener((host, port), handler_of(self._text), family,
                                    None if self._tls is None else self._tls.context)
        except (OSError, UnicodeError) as error:
            raise InvalidConfig("metrics_port", f"cannot listen on {host}:{port}: {error}; choose another "
                                "--metrics-port, 0 for a free one, or another --metrics-host") from None
        threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name="jaxinfer-metrics",
                         daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()


class Deadlines:
    """Ends connections whose time is up, from another thread than the one that waits for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[socket.socket, float] = {}

    @contextlib.contextmanager
    def within(self, seconds: float, connection: socket.socket) -> Iterator[None]:
        """While the block runs. The connection is known by a descriptor of its own, since TLS takes over the other."""
        with connection.dup() as known:
            with self._lock:
                self._ends[known] = time.monotonic() + seconds
            try:
                yield
            finally:
                with self._lock:
                    del self._ends[known]

    def enforce(self) -> None:
        """Reads and writes of a connection that is late end at once."""
        now = time.monotonic()
        with self._lock:
            for late in [one for one, end in self._ends.items() if end <= now]:
                with contextlib.suppress(OSError):  # the client was faster
                    late.shutdown(socket.SHUT_RDWR)


class Listener(ThreadingHTTPServer):
    """One thread a connection, and not many of them."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False
    request_queue_size = 4 * MAX_CONNECTIONS  # 5 otherwise: the sixth of a burst tries again after a second

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], family: int,
                 context: Callable[[], ssl.SSLContext] | None):
        self.address_family = family
        self._make_context = context
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        self._deadlines = Deadlines()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the name service, which may take seconds
        self.server_name, self.server_port = "", self.server_address[1]

    def service_actions(self) -> None:
        """With each turn of the accepting loop."""
        self._deadlines.enforce()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(TIMEOUT_SECONDS)
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        # A client that goes away, or shows no good certificate, is no error of ours.
        with contextlib.suppress(OSError), self._deadlines.within(TIMEOUT_SECONDS, request):
            if self._make_context is None:
                super().finish_request(request, client_address)
                return
            with self._make_context().wrap_socket(request, server_side=True) as wrapped:
                super().finish_request(wrapped, client_address)


def handler_of(text: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    """Answers GET /metrics; 404 for other paths, 501 for other methods."""
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "jaxinfer", ""

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != PATH:
                self.send_error(HTTPStatus.NOT_FOUND, explain=f"metrics are at {PATH}")
                return
            body = text().encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are not worth a line."""

    return Handler
