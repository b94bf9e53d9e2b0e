"""The port of the metrics: GET /metrics over HTTP, in threads of its own.

The standard library's server is enough for a scrape every few seconds. It never waits for the engine or the event loop,
and neither waits for it; a client that is slow or sends nothing holds one of few connections, for a few seconds.
"""

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxinfer.errors import InvalidConfig
from serve.exposition import CONTENT_TYPE
from serve.loopback import is_loopback
from serve.server_config import ServerConfig

PATH = "/metrics"
TIMEOUT_SECONDS = 5.0
"""What a connection gets for each read or write."""
MAX_CONNECTIONS = 16
"""Served at once; more are closed unanswered."""
POLL_SECONDS = 0.2
"""How soon `close` is noticed."""


class MetricsServer:
    """Serves what `text` gives, from `start` until `close`."""

    def __init__(self, config: ServerConfig, text: Callable[[], str]):
        self._config = config
        self._text = text
        self._is_secure = config.tls_cert is not None and not is_loopback(config.metrics_host)
        self._server: Listener | None = None

    @property
    def port(self) -> int:
        return self._server.server_address[1] if self._server is not None else 0

    @property
    def url(self) -> str:
        host = self._config.metrics_host
        name = f"[{host}]" if ":" in host else host
        return f"{'https' if self._is_secure else 'http'}://{name}:{self.port}{PATH}"

    def start(self) -> None:
        """Raises InvalidConfig where the port cannot be had."""
        host, port = self._config.metrics_host, self._config.metrics_port or 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._server = Listener((host, port), handler_of(self._text), family,
                                    self._context if self._is_secure else None)
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

    def _context(self) -> ssl.SSLContext:
        """Made for each connection, since the files may have been replaced."""
        config, context = self._config, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.tls_cert or "", config.tls_key)
        if config.tls_client_ca is not None:
            context.load_verify_locations(config.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class Listener(ThreadingHTTPServer):
    """One thread a connection, and not many of them."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], family: int,
                 context: Callable[[], ssl.SSLContext] | None):
        self.address_family = family
        self._make_context = context
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the name service, which may take seconds
        self.server_name, self.server_port = "", self.server_address[1]

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
        with contextlib.suppress(OSError):
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
