"""PEM files into contexts of `ssl`, which also says what is wrong with them: gRPC would only write it to its log."""

import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator


def load_pair(context: ssl.SSLContext, cert: bytes, key: bytes) -> None:
    """A certificate (chain) and its key. Raises ValueError with the reason."""
    try:
        with as_file(cert) as cert_file, as_file(key) as key_file:
            context.load_cert_chain(cert_file, key_file, password=_no_password)
    except OSError as error:
        raise ValueError(_reason(error)) from None


def load_authorities(context: ssl.SSLContext, roots: bytes) -> None:
    """Authorities whose certificates are believed. Raises ValueError with the reason."""
    try:
        with as_file(roots) as roots_file:
            context.load_verify_locations(roots_file)
    except OSError as error:
        raise ValueError(_reason(error)) from None


@contextlib.contextmanager
def as_file(data: bytes) -> Iterator[str]:
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


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


def _no_password() -> bytes:
    raise OSError("the key has a password; what starts by itself needs one without")
