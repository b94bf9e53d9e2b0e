"""Where a server listens, whom it lets in, and what a connection may cost it."""

import math
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from jaxinfer.errors import InvalidConfig
from jaxinfer.start_options import INT32_MAX
from serve.loopback import is_loopback

SOCKET_SCHEMES = ("unix", "unix-abstract", "vsock")
"""Not hosts to gRPC: "unix:50051" is a file."""
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
MAX_REQUEST_BYTES = 4 * 1024 * 1024
SPARE_STREAMS = 1024
"""Of a connection that runs `max_calls` calls: for those that pass at that limit, and those that are being refused."""
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # two servers on one port must fail, not share it
    ("grpc.max_send_message_length", -1),  # bounded by n, max_tokens and logprobs already
    ("grpc.keepalive_time_ms", 60_000),  # finds clients whose network is gone, so that their pages are freed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # 60 s, and gRPC 1.85 waits for these, whatever the keepalive's timeout is
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # gateways ping idle channels every 30 s
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of a server; wrong ones raise InvalidConfig.

    host, port: 0 takes a free port. drain_seconds: what running calls get to finish.
    tls_cert, tls_key: PEM files; with tls_client_ca clients need a certificate of these authorities.
    token_file: see `serve.tokens`; None asks for no tokens. insecure: listen for other machines without TLS.
    hang_seconds: after which an engine that has work and does not get on is NOT_SERVING: more than its longest step
    takes. hang_exit_seconds: after which the process ends then, with status 1; 0: never.
    stall_timeout: seconds after which a call whose answer is not read is ended.
    max_request_bytes: larger requests are refused before they are read; max_metadata_bytes: the same for the
    metadata of a call (gRPC counts 32 bytes more for each). max_calls: calls of all connections together; more are
    refused. max_streams: calls that a connection runs at once, of which clients hold back more, unseen by the server;
    None: max_calls and SPARE_STREAMS, so that what is too much is refused and not held back.
    metrics_port: where Prometheus finds the metrics over HTTP, over HTTPS where metrics_host is open to other machines
    and there is a certificate; None: nowhere. metrics_compat: "vllm" shows them under vLLM's names too.
    request_log: a line of JSON on standard error for each request that ends (`serve.request_log`).
    log_level: least level of what is logged to standard error (`serve.console`); the request log is not under it.
    otlp_endpoint: "http://host:port" of a collector that gets spans (`serve.tracing`), https with TLS; None: no spans.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    drain_seconds: float = 30.0
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    token_file: str | None = None
    insecure: bool = False
    stall_timeout: float = 60.0
    hang_seconds: float = 45.0
    hang_exit_seconds: float = 300.0
    max_request_bytes: int = MAX_REQUEST_BYTES
    max_metadata_bytes: int = 16 * 1024
    max_streams: int | None = None
    max_calls: int = 8192
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    metrics_compat: str | None = None
    request_log: bool = False
    log_level: str = "info"
    otlp_endpoint: str | None = None

    def __post_init__(self):
        for name, host in (("host", self.host), ("metrics_host", self.metrics_host)):
            if not host or host in SOCKET_SCHEMES:
                raise InvalidConfig(name, f"must be a name or an IP address of this machine, got {host!r}")
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if port is not None and not 0 <= port <= 65535:
                raise InvalidConfig(name, f"must be in [0, 65535], got {port}; 0 takes a free one")
        if not 0 <= self.drain_seconds <= threading.TIMEOUT_MAX:
            raise InvalidConfig("drain_seconds", f"must be at least 0 and finite, got {self.drain_seconds}")
        if not 0 < self.stall_timeout < math.inf:
            raise InvalidConfig("stall_timeout", f"must be over 0 and finite, got {self.stall_timeout}")
        if not 0 < self.hang_seconds < math.inf:
            raise InvalidConfig("hang_seconds", f"must be over 0 and finite, got {self.hang_seconds}")
        if self.hang_exit_seconds and not self.hang_seconds <= self.hang_exit_seconds < math.inf:
            raise InvalidConfig("hang_exit_seconds", f"must be finite and at least hang_seconds, {self.hang_seconds}, "
                                f"or 0 for never, got {self.hang_exit_seconds}")
        for name in ("max_request_bytes", "max_metadata_bytes", "max_streams", "max_calls"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= INT32_MAX:
                raise InvalidConfig(name, f"must be in [1, {INT32_MAX}], got {value}")
        if self.metrics_compat not in (None, "vllm"):
            raise InvalidConfig("metrics_compat", f"must be vllm or left out, got {self.metrics_compat!r}")
        if self.log_level not in LOG_LEVELS:
            raise InvalidConfig("log_level", f"must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        if self.otlp_endpoint is not None and not is_endpoint(self.otlp_endpoint):
            raise InvalidConfig("otlp_endpoint", "must be http://host:port or https://host:port of a collector that "
                                f"takes OTLP over gRPC, such as http://127.0.0.1:4317, got {self.otlp_endpoint!r}")
        self._check_tls()
        self._check_exposure()

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise InvalidConfig(missing, "is missing; TLS needs a certificate and its key: --tls-cert and --tls-key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InvalidConfig("tls_client_ca", "asks clients for certificates, which needs TLS; give --tls-cert and "
                                "--tls-key too")
        if self.insecure and self.tls_cert is not None:
            raise InvalidConfig("insecure", "is for a server without TLS, but there is a certificate; leave out one")

    def _check_exposure(self) -> None:
        if self.tls_cert is not None or self.insecure:
            return
        for name, host in (("host", self.host), ("metrics_host", self.metrics_host)):
            if not is_loopback(host):
                raise InvalidConfig(name, f"{host!r} is open to other machines, and what is sent would not be "
                                    "encrypted; give --tls-cert and --tls-key, or --insecure where the network is "
                                    "trusted or a proxy in front encrypts; 127.0.0.1 is for this machine only")

    def warnings(self) -> list[str]:
        """What an operator should know although it is allowed; one line each."""
        found = []
        if self.metrics_port is not None and not is_loopback(self.metrics_host) and self.tls_client_ca is None:
            found.append(f"anyone who can reach {self.metrics_host} may read the metrics: there is no --tls-client-ca")
        if is_loopback(self.host):
            return found
        if self.token_file is None and self.tls_client_ca is None:
            found.append(f"anyone who can reach {self.host} may use the model: there is no --token-file and no "
                         "--tls-client-ca")
        if self.token_file is not None and self.insecure:
            found.append("tokens travel unencrypted (--insecure): who reads the network can use them")
        return found

    def address(self, port: int) -> str:
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    @property
    def streams_of_a_connection(self) -> int:
        """How many calls a connection may have open: a gateway has one connection for all its users, its health checks
        and its aborts."""
        return min(self.max_calls + SPARE_STREAMS, INT32_MAX) if self.max_streams is None else self.max_streams

    def channel_options(self) -> tuple[tuple[str, int], ...]:
        """For `grpc.aio.server`."""
        return (
            *CHANNEL_OPTIONS,
            ("grpc.max_receive_message_length", self.max_request_bytes),
            ("grpc.max_concurrent_streams", self.streams_of_a_connection),
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),  # or it refuses some above the first already
        )


def is_endpoint(url: str) -> bool:
    """A scheme, a host and a port, and nothing that gRPC would ignore."""
    try:
        parts = urlsplit(url)
        given = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port)
    except ValueError:  # a port that is none
        return False
    return given and parts.username is None and parts.path in ("", "/") and not (parts.query or parts.fragment)
