"""The server's side of TLS: certificates from files, read again before a handshake when they have changed."""

import contextlib
import logging
import os
import ssl
import tempfile
import threading
from collections.abc import Iterator
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
        """Each file once: what is checked is what is used, whatever is put in its place meanwhile."""
        key, cert = _bytes("tls_key", self._key), _bytes("tls_cert", self._cert)
        roots = None if self._client_ca is None else _bytes("tls_client_ca", self._client_ca)
        self._check(key, cert, roots)
        return grpc.ssl_server_certificate_configuration([(key, cert)], roots)

    def _check(self, key: bytes, cert: bytes, roots: bytes | None) -> None:
        """gRPC would only log what is wrong with them, and listen all the same."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            with _as_file(cert) as cert_file, _as_file(key) as key_file:
                context.load_cert_chain(cert_file, key_file, password=_no_password)
        except (ssl.SSLError, OSError) as error:
            raise InvalidConfig("tls_cert", f"{self._cert} and {self._key} are not a PEM certificate and its private "
                                f"key: {_reason(error)}") from None
        if roots is None:
            return
        try:
            with _as_file(roots) as roots_file:
                context.load_verify_locations(roots_file)
        except (ssl.SSLError, OSError) as error:
            raise InvalidConfig("tls_client_ca", f"{self._client_ca} holds no PEM certificates: {_reason(error)}"
                                ) from None


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """A name to read `data` from, as `ssl` takes only names: in memory on Linux, so that no copy of a key is on a disk,
    elsewhere in a file that this user alone can read."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("jaxinfer-tls"), "wb", buffering=0) as file:
            file.write(data)
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile(buffering=0) as file:
            file.write(data)
            yield file.name


def _bytes(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(field, f"cannot read {path}: {error.strerror}") from None


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


def _no_password() -> bytes:
    raise OSError("the key has a password; a server that starts by itself needs one without")
