"""The persistent compile cache: private, self-checking, filled through a staging folder.

JAX writes a cache entry in place, never looks at its content again and never replaces it. An entry cut short by a kill
or a full disk therefore warns and recompiles at every start, for ever; and whoever can write the folder can run code in
our process. So JAX only ever sees a staging folder of this process:

    FOLDER/                  mode 0700, ours; otherwise the cache stays off and says why
      entries-v1/KEY.SHA256  published entries: the name holds the digest of the content, so an entry proves itself
      staging-v1/TOKEN/      KEY-cache: hard links of the entries that proved themselves, and what JAX adds
      staging-v1/TOKEN.lock  locked while the process lives

Publishing gives a complete new entry its digest name with one `link`, which happens wholly or not at all. A kill at any
moment leaves at most a staging folder, which the next start removes because nobody holds its lock. As an entry carries
its proof in its name there is no index to keep, and processes that publish at once need no other agreement.

    with compile_cache.open_cache() as cache:
        warm_up()
    print(cache.report)
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.cache_entries import JAX_SUFFIX, evict, link_valid, mark_used, publish_entry, sync
from jaxinfer.cache_folder import ENTRIES, STAGING, cache_folder, problem_with, staging_folder, sweep_staging

LOG = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 4 << 30
"""About a hundred warm starts of a large model; beyond it the least recently used entries go."""

JAX_SETTINGS: dict[str, Any] = {
    "jax_enable_compilation_cache": True,
    # Every program we warm up counts, however small or quick to compile.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # JAX's own cap was seen to stop all writes (jax issue 39880); ours is applied when publishing.
    "jax_compilation_cache_max_size": -1,
    # The GPU autotuner would write further files, not covered by any digest, into the folder.
    "jax_persistent_cache_enable_xla_caches": "none",
}

# JAX has one cache per process: whoever holds this points it at a staging folder.
_jax_cache_in_use = threading.Lock()


@dataclass(slots=True)
class CacheReport:
    """What happened to the cache; counts are entries. `problem` says in one line why the cache is off, if it is."""

    folder: Path | None
    found: int = 0
    damaged: int = 0
    published: int = 0
    evicted: int = 0
    problem: str | None = None

    def __str__(self) -> str:
        if self.problem:
            return f"compile cache off: {self.problem}"
        return (
            f"compile cache {self.folder}: {self.found} entries found, {self.damaged} damaged ones removed, "
            f"{self.published} added, {self.evicted} evicted"
        )


class CompileCache:
    """The open cache: JAX reads and writes the staging folder while the block of `open_cache` runs."""

    def __init__(self, report: CacheReport, staging: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES):
        self.report = report
        self._staging = staging
        self._max_bytes = max_bytes
        self._known = set(os.listdir(staging)) if staging else set()

    def publish(self) -> None:
        """Give every complete new entry its published name, then apply the size cap. May be repeated."""
        if self._staging is None or self.report.folder is None:
            return
        entries = self.report.folder / ENTRIES
        for name in sorted(set(os.listdir(self._staging)) - self._known):
            if name.endswith(JAX_SUFFIX) and publish_entry(self._staging / name, entries):
                self._known.add(name)
                self.report.published += 1
        mark_used(self._staging, entries)
        sync(entries)
        self.report.evicted += evict(entries, self._max_bytes)


@contextlib.contextmanager
def open_cache(
    folder: str | os.PathLike[str] | None = None, max_bytes: int = DEFAULT_MAX_BYTES
) -> Iterator[CompileCache]:
    """Sweep the cache, let JAX use it for the block, then publish what the block compiled, even if it raised.

    folder: None takes the environment variable JAXINFER_COMPILE_CACHE, else ~/.cache/jaxinfer/compile (XDG_CACHE_HOME
    is respected); "off" leaves the cache off. A cache that cannot be used is reported and never an error.

    JAX's settings are put back at the end. A second block open at the same time in this process adds to the first.
    """
    path = cache_folder(folder)
    report = CacheReport(
        path, problem="turned off, or no home folder to keep it in" if path is None else problem_with(path)
    )
    if report.problem is None and not _jax_cache_in_use.acquire(blocking=False):
        report.problem = "another start in this process is filling it"
    if path is None or report.problem is not None:
        LOG.log(logging.INFO if path is None else logging.WARNING, "%s", report)
        yield CompileCache(report)
        return
    try:
        with contextlib.ExitStack() as stack:
            yield _start(stack, path, report, max_bytes)
    finally:
        _jax_cache_in_use.release()


def _start(stack: contextlib.ExitStack, path: Path, report: CacheReport, max_bytes: int) -> CompileCache:
    """Everything `open_cache` undoes later is pushed on `stack`; a full or failing disk only turns the cache off."""
    try:
        sweep_staging(path / STAGING)
        staging = stack.enter_context(staging_folder(path / STAGING))
        report.found, report.damaged = link_valid(path / ENTRIES, staging)
        stack.enter_context(_jax_uses(staging))
    except OSError as error:
        report.problem = f"{path}: {error.strerror or error}"
        LOG.warning("%s", report)
        return CompileCache(report)
    cache = CompileCache(report, staging, max_bytes)
    stack.callback(_publish_quietly, cache)
    return cache


def _publish_quietly(cache: CompileCache) -> None:
    try:
        cache.publish()
    except OSError as error:
        LOG.warning("compile cache %s: could not publish: %s", cache.report.folder, error.strerror or error)


@contextlib.contextmanager
def _jax_uses(staging: Path) -> Iterator[None]:
    """Point JAX's cache at `staging`, and put its settings back afterwards."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {**JAX_SETTINGS, "jax_compilation_cache_dir": str(staging)}
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at its settings once; forget the look
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
