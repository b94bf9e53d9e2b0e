"""Entries of a compile cache folder, proved here by what their names say, not by the code under test."""

import hashlib
import zlib
from pathlib import Path


def entries(folder: Path) -> list[Path]:
    """What is published; none if there is no cache yet."""
    inner = folder / "entries-v1"
    return sorted(inner.iterdir()) if inner.is_dir() else []


def damaged(folder: Path) -> list[str]:
    """Names of entries that are not whole, or not what their names say."""
    return [path.name for path in entries(folder) if not is_whole(path)]


def is_whole(path: Path) -> bool:
    content = path.read_bytes()
    return path.name.endswith(hashlib.sha256(content).hexdigest()) and unpacks(content)


def unpacks(content: bytes) -> bool:
    """Whether a compressed stream ends where the file does; one of zstd is left to its digest."""
    if content[:4] == b"\x28\xb5\x2f\xfd":
        return True
    stream = zlib.decompressobj()
    try:
        stream.decompress(content)
    except zlib.error:
        return False
    return stream.eof and not stream.unused_data
