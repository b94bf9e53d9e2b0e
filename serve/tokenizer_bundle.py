"""A tokenizer's files as one archive, for clients that tokenise themselves."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

from jaxinfer.errors import TokenizerMissing
from jaxinfer.tokenizer import TOKENIZER_FILE, Tokenizer

FILES = (
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What tells a client how text becomes ids; nothing else of the folder leaves it."""


class Bundle(NamedTuple):
    """A zip archive and its SHA-256 in hexadecimal."""

    archive: bytes
    sha256: str


def bundle(tokenizer: Tokenizer) -> Bundle:
    """The same bytes for the same files, so that replicas have one fingerprint.

    Raises TokenizerMissing where the tokenizer has no files. Takes a second for a large one: not for an event loop.
    """
    if tokenizer.folder is None or not (tokenizer.folder / TOKENIZER_FILE).is_file():
        raise TokenizerMissing(f"there is no {TOKENIZER_FILE} to send; give the client the tokenizer's folder")
    archive = zipped([tokenizer.folder / name for name in FILES])
    return Bundle(archive, hashlib.sha256(archive).hexdigest())


def zipped(paths: list[Path]) -> bytes:
    """Those of the files that exist, under their names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in paths:
            if path.is_file():
                entry = zipfile.ZipInfo(path.name)  # without the file's time
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
