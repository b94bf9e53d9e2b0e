"""Servers that are killed at any moment, also while they compile; a compile cache that is damaged."""

import os
import random
import time
from collections import Counter
from pathlib import Path

import cache_entries_check
import pytest
import server_process
from endings import told_unavailable
from figures import Figures
from server_process import DEMO, SMALLEST, ServerProcess
from tqdm import tqdm

ASKED = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "timeout": 60}


class Restarts:
    """Starts servers one after the other, on one compile cache of their own."""

    def __init__(self, folder: Path):
        self.cache = folder / "cache"
        self._folder = folder
        self._started: list[ServerProcess] = []

    def start(self, cache: Path | None = None) -> ServerProcess:
        environment = server_process.in_environment(JAXINFER_COMPILE_CACHE=str(cache or self.cache))
        server = server_process.start((*DEMO, *SMALLEST, "--drain-seconds", "5"), self._folder, environment)
        self._started.append(server)
        return server

    def ready(self) -> tuple[ServerProcess, float]:
        """A server that is ready, and after how many seconds it was."""
        server = self.start()
        server.wait_bound()
        return server, server.wait_ready()

    def close(self) -> None:
        for server in self._started:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def restarts(tmp_path_factory: pytest.TempPathFactory):
    found = Restarts(tmp_path_factory.mktemp("restarts"))
    yield found
    found.close()


def test_kills(restarts: Restarts, count, is_full: bool, figures: Figures):
    """Killed while it compiles, loads and serves: whoever calls knows at once, and no entry of the cache is damaged."""
    rng, damaged, lags = random.Random(5), [], []
    server, cold = restarts.ready()
    wanted = answer(server)
    lags += killed_under_streams(server)
    damaged += cache_entries_check.damaged(restarts.cache)
    moments: Counter[str] = Counter({"serving": 1})
    for number in tqdm(range(1, count(3, 50)), desc="kills", disable=not is_full):
        if number % 3 == 1:  # with an empty cache, which it fills if it gets so far
            cache = restarts.cache.with_name(f"cache-{number}")
            server = restarts.start(cache)
            moments[killed_after(server, rng.uniform(0.1, 1.1) * cold)] += 1
        else:
            cache = restarts.cache
            server, _ = restarts.ready()
            time.sleep(rng.random() * 0.5)
            lags += killed_under_streams(server)
            moments["serving"] += 1
        damaged += cache_entries_check.damaged(cache)
    server, warm = restarts.ready()
    same = answer(server) == wanted
    figures(kills=moments.total(), moments=dict(moments), damaged_entries=len(damaged), UNAVAILABLE_after_ms=1000 * max(
        lags), cold_s=cold, warm_s=warm, last_start_answers_right=same)
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert same and not damaged
    assert max(lags) < 1.0
    assert server.lines(" 0 damaged ones removed, 0 added")
    if is_full:
        assert warm <= cold / 3


def answer(server: ServerProcess) -> tuple[int, ...]:
    with server.client() as client:
        return client.generate("class Stack:\n", **ASKED).token_ids


def killed_after(server: ServerProcess, seconds: float) -> str:
    """What it was doing when it was killed."""
    time.sleep(max(server.began + seconds - time.monotonic(), 0))
    doing = "serving" if server.lines("ready on ") else "compiling" if server.lines("memory on ") else "starting"
    server.process.kill()
    server.process.wait()
    return doing


def killed_under_streams(server: ServerProcess) -> list[float]:
    """Kills it while streams run; seconds until each of them, and a new call, was told UNAVAILABLE."""
    with server.client() as client:
        return told_unavailable(client, server.process.kill, server.process.wait)


def test_a_damaged_cache_heals(restarts: Restarts, figures: Figures):
    """The whole server's view of it; the kinds of damage are in tests/jaxinfer/test_compile_cache.py."""
    found = cache_entries_check.entries(restarts.cache)
    assert len(found) > 10, "test_kills makes them"
    found[0].write_bytes(found[0].read_bytes()[:-9])
    found[1].write_bytes(b"")
    found[2].write_bytes(os.urandom(found[2].stat().st_size))
    found[3].unlink()
    server, mended = restarts.ready()
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert server.lines(f"{len(found) - 4} entries found, 3 damaged ones removed, 4 added")
    assert not cache_entries_check.damaged(restarts.cache)
    server, warm = restarts.ready()
    server.process.terminate()
    assert server.process.wait(30) == 0
    figures(entries=len(found), damaged=4, mended_start_s=mended, next_start_s=warm)
    assert server.lines(f"{len(found)} entries found, 0 damaged ones removed, 0 added")
