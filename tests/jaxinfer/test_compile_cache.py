"""The compile cache: damage is found and healed, kills and races never publish it, and a second start is warm."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import pytest

from jaxinfer import cache_entries, compile_cache
from jaxinfer.cache_folder import ENTRIES, STAGING, cache_folder
from jaxinfer.compile_cache import CompileCache, open_cache

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parents[2]
FILLER = Path(__file__).with_name("compile_cache_filler.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def no_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are all that most tests look at."""
    monkeypatch.setattr(compile_cache, "_jax_uses", lambda staging: contextlib.nullcontext())


def staging_of(cache: CompileCache) -> Path:
    assert cache._staging is not None
    return cache._staging


def entry(seed: int, size: int = 2000) -> bytes:
    """What JAX would write: a whole zlib stream."""
    return zlib.compress(random.Random(seed).randbytes(size))


def fill(folder: Path, seeds=range(4), **options) -> None:
    with open_cache(folder, **options) as cache:
        for seed in seeds:
            (staging_of(cache) / f"jit_step_{seed}-cache").write_bytes(entry(seed))


def entries(folder: Path) -> list[Path]:
    return sorted((folder / ENTRIES).iterdir())


def keys(folder: Path) -> list[str]:
    return [path.name.rpartition(".")[0] for path in entries(folder)]


def test_entries_survive_and_are_offered_again(folder, no_jax):
    fill(folder)
    with open_cache(folder) as cache:
        assert cache.report.found == 4 and cache.report.damaged == 0
        names = sorted(os.listdir(staging_of(cache)))
        assert names == [f"jit_step_{seed}-cache" for seed in range(4)]
        assert (staging_of(cache) / names[0]).read_bytes() == entry(0)
    assert cache.report.published == 0
    assert not list((folder / STAGING).iterdir())


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(random.Random(9).randbytes(path.stat().st_size)),
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "renamed": lambda path: path.rename(path.with_name("jit_step_9-cache")),
    "swapped name": lambda path: path.rename(path.with_name("jit_step_9." + "0" * 64)),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
    "a link": lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_entries_are_deleted_and_written_again(folder, no_jax, damage):
    fill(folder)
    damage(entries(folder)[1])
    with open_cache(folder) as cache:
        assert cache.report.found == 3 and cache.report.damaged >= 1
        assert "jit_step_1-cache" not in os.listdir(staging_of(cache))
        (staging_of(cache) / "jit_step_1-cache").write_bytes(entry(1))
    assert keys(folder) == [f"jit_step_{seed}" for seed in range(4)]
    with open_cache(folder) as cache:
        assert cache.report.found == 4 and cache.report.damaged == 0


@pytest.mark.parametrize("content", [b"", entry(1)[:-1], entry(1) + b"x", b"not a stream", b"\x28\xb5\x2f\xfd"])
def test_an_entry_that_was_not_written_to_its_end_is_not_published(folder, no_jax, content):
    with open_cache(folder) as cache:
        (staging_of(cache) / "jit_step_1-cache").write_bytes(content)
        (staging_of(cache) / "jit_step_2-cache").write_bytes(entry(2))
        (staging_of(cache) / "notes.txt").write_bytes(entry(3))
    assert keys(folder) == ["jit_step_2"]


def test_publishing_may_be_repeated_and_happens_also_when_the_block_raises(folder, no_jax):
    with pytest.raises(KeyboardInterrupt), open_cache(folder) as cache:
        (staging_of(cache) / "jit_step_1-cache").write_bytes(entry(1))
        cache.publish()
        assert keys(folder) == ["jit_step_1"]
        (staging_of(cache) / "jit_step_2-cache").write_bytes(entry(2))
        raise KeyboardInterrupt
    assert keys(folder) == ["jit_step_1", "jit_step_2"]
    assert cache.report.published == 2


def test_least_recently_used_entries_leave_when_the_cap_is_passed(folder, no_jax):
    fill(folder, range(5))
    for age, path in enumerate(reversed(entries(folder))):
        os.utime(path, (1_700_000_000, 1_700_000_000 - age))  # entry 0 is the oldest
    size = len(entry(0))
    with open_cache(folder, max_bytes=3 * size + 200) as cache:
        (staging_of(cache) / "jit_step_0-cache").read_bytes()  # what JAX does on a hit
    assert cache.report.evicted == 2
    if keys(folder) != ["jit_step_2", "jit_step_3", "jit_step_4"]:  # a mount that keeps no access times
        assert keys(folder) == ["jit_step_0", "jit_step_3", "jit_step_4"]


def test_file_systems_without_hard_links_get_copies(folder, no_jax, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    fill(folder)
    with open_cache(folder) as cache:
        assert cache.report.found == 4
        assert (staging_of(cache) / "jit_step_2-cache").read_bytes() == entry(2)


# Who may use it.


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_open_to_others_is_refused_in_one_line(folder, mode, caplog):
    folder.mkdir()
    folder.chmod(mode)
    with open_cache(folder) as cache:
        pass
    assert f"mode {mode:04o}" in str(cache.report) and "\n" not in str(cache.report)
    assert str(folder) in caplog.text
    assert not list(folder.iterdir())


def test_an_inner_folder_open_to_others_is_refused(folder, no_jax):
    fill(folder)
    (folder / ENTRIES).chmod(0o777)
    with open_cache(folder) as cache:
        assert "open to other users" in str(cache.report)


def test_a_parent_that_everybody_can_write_is_refused(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with open_cache(shared / "cache") as cache:
        assert "writable by everybody" in str(cache.report)


def test_another_users_folder_is_refused(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with open_cache(folder) as cache:
        assert "belongs to user" in str(cache.report)


def test_what_it_makes_is_private(folder, no_jax):
    fill(folder)
    for path in (folder, folder / ENTRIES, folder / STAGING):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_way_turns_it_off(tmp_path):
    (tmp_path / "cache").write_text("")
    with open_cache(tmp_path / "cache") as cache:
        assert cache.report.problem


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXINFER_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jaxinfer" / "compile"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "jaxinfer" / "compile"
    monkeypatch.setenv("JAXINFER_COMPILE_CACHE", "off")
    assert cache_folder() is None
    assert cache_folder("~/x") == tmp_path / "x"


def test_a_disk_that_fails_turns_it_off(folder, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache, "link_valid", refuse)
    with open_cache(folder) as cache:
        cache.publish()
    assert "No space left" in str(cache.report)
    with open_cache(folder) as cache:  # the lock of the process was given back
        assert "No space left" in str(cache.report)


# Kills and races: the filler writes entries byte range by byte range, as a slow JAX, and publishes after each.


def filler(folder: Path, seed: int, num_entries: int) -> subprocess.Popen:
    command = [sys.executable, str(FILLER), str(folder), str(seed), str(num_entries)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for_start(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "filling\n"


def check_all_valid(folder: Path) -> None:
    assert all(cache_entries.proves_itself(path) for path in entries(folder))


def test_a_kill_at_any_moment_leaves_only_valid_entries(folder):
    moments = random.Random(0)
    for seed in range(8):
        process = filler(folder, seed, num_entries=100_000)
        wait_for_start(process)
        wanted = len(entries(folder)) + moments.randrange(4)
        while len(entries(folder)) < wanted:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        check_all_valid(folder)
        assert len(list((folder / STAGING).iterdir())) == 2  # what the next start removes
    assert len(entries(folder)) > 3
    with open_cache(folder) as cache:
        assert cache.report.damaged == 0
        assert len(list((folder / STAGING).iterdir())) == 2  # our own


def test_processes_that_publish_at_once_do_not_disturb_each_other(folder):
    processes = [filler(folder, seed, num_entries=60) for seed in (1, 1, 2)]
    for process in processes:
        assert process.wait(300) == 0
        process.stdout.close()
    check_all_valid(folder)
    assert set(keys(folder)) == {f"jit_step_{number}" for number in range(60)}
    assert not list((folder / STAGING).iterdir())


def test_a_live_processs_staging_folder_is_left_alone(folder):
    process = filler(folder, 1, num_entries=100_000)
    try:
        wait_for_start(process)
        with open_cache(folder):
            assert len(list((folder / STAGING).iterdir())) == 4
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lock_just_made_is_not_taken_for_a_dead_one(folder, no_jax):
    fill(folder)
    lock = folder / STAGING / "1-abc.lock"
    lock.touch()
    fill(folder, [])
    assert lock.exists()
    os.utime(lock, (1, 1))
    fill(folder, [])
    assert not lock.exists()


# With JAX itself.


def build_two_programs():
    """How many programs JAX made, and how many of them it found in the cache."""
    import jax
    import jax.numpy as jnp

    from jaxinfer.compile_counter import CompileCounter

    jax.clear_caches()
    counter = CompileCounter()
    for size in (3, 5):
        jax.jit(lambda x: jnp.tanh(x @ x)).lower(jax.ShapeDtypeStruct((size, size), "float32")).compile()
    counter.close()
    return counter.count, counter.loaded


def test_jax_finds_everything_at_the_second_start_and_damage_heals(folder):
    def start():
        with open_cache(folder) as cache:
            return build_two_programs(), cache.report

    (programs, loaded), report = start()
    assert (programs, loaded) == (2, 0)
    assert report.published == 2
    (programs, loaded), report = start()
    assert (programs, loaded, report.published) == (2, 2, 0)
    entries(folder)[0].write_bytes(b"")
    (programs, loaded), report = start()
    assert (programs, loaded, report.damaged, report.published) == (2, 1, 1, 1)
    (programs, loaded), report = start()
    assert (programs, loaded, report.damaged, report.published) == (2, 2, 0, 0)


def test_jaxs_settings_are_put_back_and_nothing_is_written_later(folder, tmp_path):
    import jax

    before = {name: getattr(jax.config, name) for name in (*compile_cache.JAX_SETTINGS, "jax_compilation_cache_dir")}
    with open_cache(folder), open_cache(tmp_path / "second") as second:
        assert "another start" in str(second.report)
        assert str(folder) in jax.config.jax_compilation_cache_dir
    assert {name: getattr(jax.config, name) for name in before} == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_two_programs() == (2, 0)
    assert not entries(folder)


def test_another_process_starts_warm(folder):
    script = (
        "import sys; from jaxinfer.compile_cache import open_cache\n"
        "from tests.jaxinfer.test_compile_cache import build_two_programs\n"
        "with open_cache(sys.argv[1]): print(*build_two_programs())"
    )

    def start() -> str:
        command = [sys.executable, "-c", script, str(folder)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.strip()

    assert [start(), start()] == ["2 0", "2 2"]


def test_a_removed_folder_while_open_is_only_a_warning(folder, no_jax):
    with open_cache(folder):
        shutil.rmtree(folder)
