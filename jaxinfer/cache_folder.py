"""Where the compile cache lives, whether it may be trusted, and the staging folder of this process in it."""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from jaxinfer.cache_entries import remove

ENVIRONMENT_VARIABLE = "JAXINFER_COMPILE_CACHE"
"""A folder to use instead of the default one, or "off"."""

ENTRIES, STAGING = "entries-v1", "staging-v1"


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder that `open_cache(folder)` would use; None when it is turned off."""
    chosen = os.fspath(folder) if folder is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen == "off":
        return None
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = xdg if os.path.isabs(xdg) else os.path.expanduser("~/.cache")
    # Without a home `~` stays as it is; a folder of that name in the working directory would help nobody.
    return Path(base, "jaxinfer", "compile") if os.path.isabs(base) else None


def problem_with(path: Path) -> str | None:
    """Make the folder if it is missing; the reason in one line when it is not ours alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        problem = _not_private(path.resolve()) or _replaceable(path.resolve())
        for name in (ENTRIES, STAGING) if problem is None else ():
            (path / name).mkdir(mode=0o700, exist_ok=True)
            problem = problem or _not_private(path / name)
        return problem
    except OSError as error:
        return f"{path}: {error.strerror or error}"


def _not_private(folder: Path) -> str | None:
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        return f"{folder} is not a folder"
    if facts.st_uid != os.getuid():
        return f"{folder} belongs to user {facts.st_uid}; name another folder in {ENVIRONMENT_VARIABLE}"
    if facts.st_mode & 0o077:
        # Not mended with a chmod: what others put in while it was open would still be there.
        mode = stat.S_IMODE(facts.st_mode)
        remedy = f"delete it, or name another folder in {ENVIRONMENT_VARIABLE}"
        return f"{folder} is open to other users (mode {mode:04o}); {remedy}"
    return None


def _replaceable(folder: Path) -> str | None:
    """A parent in which another user could put a folder of his own in the place of ours."""
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"{parent} is writable by everybody; name a folder elsewhere in {ENVIRONMENT_VARIABLE}"
    return None


@contextlib.contextmanager
def staging_folder(root: Path) -> Iterator[Path]:
    """A fresh folder of this process; its lock tells other processes that we live."""
    token = f"{os.getpid()}-{secrets.token_hex(6)}"
    lock = root / f"{token}.lock"
    with lock.open("x") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a sweep may hold it for a moment
        lock.stat()  # raises if that sweep found us too old and removed it
        folder = root / token
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def sweep_staging(root: Path) -> None:
    """Remove what dead processes left; the kernel drops a lock with its process, so a reused pid misleads nobody."""
    for path in sorted(root.iterdir()):
        if path.suffix == ".lock":
            with contextlib.suppress(OSError), path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_dead(path, file)
        elif not path.with_name(f"{path.name}.lock").exists():
            remove(path)


def _remove_dead(lock: Path, file: TextIO) -> None:
    """Remove a staging folder whose lock we hold, unless its owner is just between making the lock and taking it."""
    young = time.time() - os.fstat(file.fileno()).st_mtime < 5.0
    folder = lock.with_suffix("")
    if folder.exists() or not young:
        remove(folder)
        lock.unlink(missing_ok=True)
