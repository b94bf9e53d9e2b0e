"""The entries of the compile cache: proving, linking, publishing and evicting them. `compile_cache` says what for."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

JAX_SUFFIX = "-cache"
"""JAX reads and writes KEY-cache."""

PUBLISHED_NAME = re.compile(r"(?P<key>.+)\.(?P<digest>[0-9a-f]{64})")
MAX_NAME_BYTES = 255


def link_valid(entries: Path, staging: Path) -> tuple[int, int]:
    """Link every entry that proves itself into `staging`, delete all else; how many of each."""
    paths = [Path(item.path) for item in os.scandir(entries)]
    # Digests are computed outside the interpreter lock; a cache of gigabytes is read at the speed of the disk.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        valid = list(pool.map(proves_itself, paths))
    for path, ok in zip(paths, valid, strict=True):
        if not ok:
            remove(path)
    good = sorted((path for path, ok in zip(paths, valid, strict=True) if ok), key=_last_used, reverse=True)
    for path in good:
        _link_for_jax(path, staging)
    return len(good), len(paths) - len(good)


def proves_itself(path: Path) -> bool:
    name = PUBLISHED_NAME.fullmatch(path.name)
    try:
        return bool(name) and stat.S_ISREG(path.lstat().st_mode) and _digest(path) == name["digest"]
    except OSError:
        return False


def _link_for_jax(path: Path, staging: Path) -> None:
    name = PUBLISHED_NAME.fullmatch(path.name)
    target = staging / f"{name['key'] if name else path.name}{JAX_SUFFIX}"
    # The name exists when a program was built twice; the entry is gone when another process evicted it meanwhile.
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        _place(path, target, staging)
        # An access time in the past lets `mark_used` see which entries JAX reads, also where mounts update it lazily.
        os.utime(target, ns=(0, target.stat().st_mtime_ns))


def _place(source: Path, target: Path, staging: Path) -> None:
    """Give the content of `source` a second name, wholly or not at all. FileExistsError when the name is taken."""
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # a file system without hard links
        copy = staging / f"{secrets.token_hex(6)}.copy"
        shutil.copy2(source, copy)
        sync(copy)
        copy.rename(target)


def publish_entry(source: Path, entries: Path) -> bool:
    """Link `source` into the published folder under its digest name; False if it is no complete entry."""
    content = source.read_bytes()
    if not is_complete(content):
        return False
    name = f"{source.name.removesuffix(JAX_SUFFIX)}.{hashlib.sha256(content).hexdigest()}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        return False
    sync(source)
    with contextlib.suppress(FileExistsError):  # another process published the same bytes
        _place(source, entries / name, source.parent)
    return True


def is_complete(content: bytes) -> bool:
    """Whether JAX finished writing the entry: its compressed stream must end where the file ends.

    A write that failed (disk full) leaves a prefix and only a warning. A format we cannot check is not published.
    """
    if content[:4] == b"\x28\xb5\x2f\xfd":
        return _zstd_is_complete(content)
    stream = zlib.decompressobj()
    try:
        # In pieces: an executable unpacks to several times its size and we only want to see the end.
        for start in range(0, len(content), 1 << 18):
            stream.decompress(content[start : start + (1 << 18)])
        return stream.eof and not stream.unused_data
    except zlib.error:
        return False


def _zstd_is_complete(content: bytes) -> bool:
    """JAX compresses with zstd from Python 3.14 on, or where `zstandard` is installed."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd  # pyright: ignore[reportMissingImports]

            stream = zstd.ZstdDecompressor()
        else:
            import zstandard  # pyright: ignore[reportMissingImports]

            stream = zstandard.ZstdDecompressor().decompressobj()
        stream.decompress(content)
    except Exception:  # not installed, or damaged: each of the two libraries has its own error
        return False
    return bool(stream.eof and not stream.unused_data)


def mark_used(staging: Path, entries: Path) -> None:
    """Renew the modification time, which orders entries by use, of those that JAX has read."""
    read = {item.name.removesuffix(JAX_SUFFIX) for item in os.scandir(staging) if item.stat().st_atime_ns > 0}
    for item in os.scandir(entries):
        name = PUBLISHED_NAME.fullmatch(item.name)
        if name and name["key"] in read:
            with contextlib.suppress(FileNotFoundError):
                os.utime(item.path)


def evict(entries: Path, max_bytes: int) -> int:
    """Delete the least recently used entries beyond `max_bytes`; how many."""
    total = evicted = 0
    for path in sorted((Path(item.path) for item in os.scandir(entries)), key=_last_used, reverse=True):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
            if total > max_bytes:
                remove(path)
                evicted += 1
    return evicted


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Onto the disk: a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
