"""The client's side of TLS and tokens. Knows grpc, never jax."""

import contextlib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from serve.loopback import is_local
from serve.pem import load_authorities, load_pair

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files. ca: authorities that may have signed the server's certificate; None takes the machine's own.

    cert, key: what a server shows that asks for certificates, both or none. server_name: the name in the server's
    certificate, where it is reached by another one.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self):
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client's certificate needs its key: give both cert and key, or none")

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError for a file that cannot be read, ValueError for one that is not what it should be."""
        ca, key, cert = _bytes(self.ca), _bytes(self.key), _bytes(self.cert)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca is not None:
            with _named(f"{self.ca} holds no PEM certificates"):
                load_authorities(context, ca)
        if cert is not None and key is not None:
            with _named(f"{self.cert} and {self.key} are not a PEM certificate and its private key"):
                load_pair(context, cert, key)
        return grpc.ssl_channel_credentials(ca, key, cert)


def open_channel(module: Any, address: str, tls: Tls | bool | None, options: tuple[tuple[str, Any], ...]) -> Any:
    """A channel of `grpc` or `grpc.aio`. tls: True is TLS with the machine's authorities."""
    if not tls:
        return module.insecure_channel(address, options=options)
    chosen = Tls() if tls is True else tls
    if chosen.server_name is not None:
        options = (*options, ("grpc.ssl_target_name_override", chosen.server_name))
    return module.secure_channel(address, chosen.credentials(), options=options)


def bearer(token: str | None, address: str, *, encrypted: bool) -> Metadata | None:
    """A token as the metadata of a call; None without one.

    Raises ValueError, without the token in its text, where it would cross a network unencrypted.
    """
    if token is None:
        return None
    if not encrypted and not is_local(address):
        raise ValueError(f"a token to {address} would travel unencrypted; give tls=True or tls=Tls(ca=...), or "
                         "insecure=True where the network is trusted")
    if not token.isascii() or not token.isprintable() or not token.strip():
        raise ValueError("the token must be of printable ASCII characters; it is perhaps the name of a file?")
    return (("authorization", f"Bearer {token}"),)


class _WithMetadata:
    """As much of a channel as a stub of unary requests needs."""

    def __init__(self, channel: Any, metadata: Metadata):
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(self._channel.unary_unary(*args, **kwargs), metadata=self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(self._channel.unary_stream(*args, **kwargs), metadata=self._metadata)


def with_metadata(channel: Any, metadata: Metadata | None) -> Any:
    """`channel` for a stub all of whose calls carry `metadata`."""
    return channel if metadata is None else _WithMetadata(channel, metadata)


@contextlib.contextmanager
def _named(problem: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from None


def _bytes(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
