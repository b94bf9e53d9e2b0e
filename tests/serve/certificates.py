"""Authorities and certificates for tests, by the openssl command."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from serve.client_security import Tls

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


@dataclass(frozen=True)
class Issued:
    """A certificate, its key, and the authority's certificate."""

    cert: Path
    key: Path
    ca: Path

    def trusted(self, shown: "Issued | None" = None) -> Tls:
        """How a client connects that trusts this one's authority, and shows a certificate of its own."""
        return Tls(ca=self.ca, cert=shown and shown.cert, key=shown and shown.key)

    def replace(self, other: "Issued") -> None:
        """Puts another certificate and key into this one's files, as an operator does."""
        shutil.copy(other.key, self.key)
        shutil.copy(other.cert, self.cert)


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self._name = name
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        openssl(self.cert, self._key, name, "-addext", "basicConstraints=critical,CA:TRUE")

    def issue(self, name: str) -> Issued:
        cert, key = (self._folder / f"{self._name}-{name}.{suffix}" for suffix in ("pem", "key"))
        openssl(cert, key, name, "-addext", "subjectAltName=IP:127.0.0.1", "-addext",
                "basicConstraints=critical,CA:FALSE", "-CA", str(self.cert), "-CAkey", str(self._key))
        return Issued(cert, key, self.cert)


def openssl(cert: Path, key: Path, name: str, *options: str) -> None:
    command = ("openssl", "req", "-x509", *NEW_KEY, "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(cert))
    subprocess.run([*command, *options], check=True, capture_output=True)
