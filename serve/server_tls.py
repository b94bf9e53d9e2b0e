"""The server's side of TLS: certificates from files, read again before a handshake when they have changed."""

import logging
import ssl
import threading
from pathlib import Path
from typing import Any

import grpc

from jaxinfer.errors import InvalidConfig
from serve.changed_files import ChangedFiles

log = logging.getLogger(__name__)


class ServerTls:
    """Certificate and key (PEM), and with client_ca the authorities whose certificates clients must have.

    Connections that are there keep what they began with. Files that do not fit, as while they are being replaced,
    leave the last good ones in force.
    """

    def __init__(self, cert: str | Path, key: str | Path, client_ca: str | Path | None = None):
        """Raises InvalidConfig."""
        self._cert, self._key = Path(cert), Path(key)
        self._client_ca = None if client_ca is None else Path(client_ca)
        self._files = ChangedFiles([one for one in (self._cert, self._key, self._client_ca) if one is not None])
        self._lock = threading.Lock()
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        renewed: Any = self._renewed  # None for no change is documented and not typed
        return grpc.dynamic_ssl_server_credentials(
            self._first, renewed, require_client_authentication=self._client_ca is not None)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is new since the last handshake; on threads of gRPC's."""
        with self._lock:
            if not self._files.changed():
                return None
            try:
                found = self._read()
            except InvalidConfig as error:
                log.error("the last certificates stay in force: %s", error)
                return None
        log.info("read new certificates from %s", self._cert)
        return found

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = _bytes("tls_key", self._key), _bytes("tls_cert", self._cert)
        roots = None if self._client_ca is None else _bytes("tls_client_ca", self._client_ca)
        self._check()
        return grpc.ssl_server_certificate_configuration([pair], roots)

    def _check(self) -> None:
        """gRPC would only log what is wrong with them, and listen all the same."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except (ssl.SSLError, OSError) as error:
            raise InvalidConfig("tls_cert", f"{self._cert} and {self._key} are not a PEM certificate and its private "
                                f"key: {_reason(error)}") from None
        if self._client_ca is None:
            return
        try:
            context.load_verify_locations(self._client_ca)
        except (ssl.SSLError, OSError) as error:
            raise InvalidConfig("tls_client_ca", f"{self._client_ca} holds no PEM certificates: {_reason(error)}"
                                ) from None


def _bytes(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(field, f"cannot read {path}: {error.strerror}") from None


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


def _no_password() -> bytes:
    raise OSError("the key has a password; a server that starts by itself needs one without")
