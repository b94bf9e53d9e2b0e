"""The server's side of TLS: certificates from files, read again before a handshake when they have changed."""

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from jaxinfer.errors import InvalidConfig
from serve.last_good import LastGood
from serve.pem import load_authorities, load_pair


@dataclass(frozen=True, slots=True)
class Certificates:
    """The same files as gRPC takes them and as `ssl` does."""

    grpc: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext


class ServerTls:
    """Certificate and key (PEM), and with client_ca the authorities whose certificates clients must have.

    Connections that are there keep what they began with. Files that do not fit, as while they are being replaced,
    leave the last good ones in force.
    """

    def __init__(self, cert: str | Path, key: str | Path, client_ca: str | Path | None = None):
        """Raises InvalidConfig."""
        self._cert, self._key = Path(cert), Path(key)
        self._client_ca = None if client_ca is None else Path(client_ca)
        paths = [one for one in (self._cert, self._key, self._client_ca) if one is not None]
        self._files = LastGood("certificates", paths, self._read)
        self._lock = threading.Lock()
        self._given = self._files.get()

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        renewed: Any = self._renewed  # None for no change is documented and not typed
        return grpc.dynamic_ssl_server_credentials(
            self._given.grpc, renewed, require_client_authentication=self._client_ca is not None)

    def context(self) -> ssl.SSLContext:
        """For one handshake of a server that is not gRPC's."""
        return self._files.get().context

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is new since gRPC's last handshake; on threads of gRPC's."""
        with self._lock:
            found = self._files.get()
            if found is self._given:
                return None
            self._given = found
            return found.grpc

    def _read(self) -> Certificates:
        """Each file once: what is checked is what is used, whatever is put in its place meanwhile."""
        key, cert = _bytes("tls_key", self._key), _bytes("tls_cert", self._cert)
        roots = None if self._client_ca is None else _bytes("tls_client_ca", self._client_ca)
        context = self._checked(key, cert, roots)
        return Certificates(grpc.ssl_server_certificate_configuration([(key, cert)], roots), context)

    def _checked(self, key: bytes, cert: bytes, roots: bytes | None) -> ssl.SSLContext:
        """gRPC would only log what is wrong with them, and listen all the same."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            load_pair(context, cert, key)
        except ValueError as error:
            raise InvalidConfig("tls_cert", f"{self._cert} and {self._key} are not a PEM certificate and its private "
                                f"key: {error}") from None
        if roots is not None:
            try:
                load_authorities(context, roots)
            except ValueError as error:
                raise InvalidConfig("tls_client_ca", f"{self._client_ca} holds no PEM certificates: {error}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _bytes(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(field, f"cannot read {path}: {error.strerror}") from None
