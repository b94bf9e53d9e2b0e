"""Damages a model's folder in random ways and loads it, many times over. Runs in a process of its own."""

import json
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxinfer.errors import ModelFormatError, TokenizerMissing
from jaxinfer.intake import GenerationDefaults
from jaxinfer.loading import load_model
from jaxinfer.tokenizer import Tokenizer

TEXT = "def f(x):\n    return x + 1  # ünï\n"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, -2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), "", "0", "\x00",
    "x" * 100_000, "../../etc/passwd", "\ud800", [], {}, [None], {"": {}}, [[]] * 1000, [0, 2**40], "bfloat16", "F64",
)  # fmt: skip
"""What takes the place of a value of a JSON file or of a weights file's header."""


@dataclass
class Loads:
    """codes: "loaded", or the type of the error. unexpected: some of the loads that ended otherwise than they may.
    slowest: seconds of one. memory: bytes that the process's peak grew by.
    """

    codes: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    slowest: float = 0.0
    memory: int = 0


def load(folder: Path) -> None:
    """Everything that a start reads of a folder but the chat template, whose process is slow to start."""
    load_model(folder)
    GenerationDefaults.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.decode(tokenizer.encode(TEXT))


def load_damaged(original: Path, work: Path, seed: int, count: int, shows: bool) -> Loads:
    """`count` loads of copies of `original`, each with one file damaged, in the sequence that `seed` names."""
    rng, loads = random.Random(seed), Loads()
    shutil.copytree(original, work)
    load(work)  # what jax and the tokenizer hold from the first load on is not the damage's
    before = peak()
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    for _ in tqdm(range(count), desc="damaged models", disable=not shows):
        file = rng.choice(files)
        what = damage(rng, work / file)
        began = time.monotonic()
        code, problem = outcome(work)
        seconds = time.monotonic() - began
        loads.codes[code] += 1
        loads.slowest = max(loads.slowest, seconds)
        if problem and len(loads.unexpected) < 10:
            loads.unexpected.append(f"{file}, {what}, {seconds:.1f} s: {problem}")
        mend(original / file, work / file)
    loads.memory = peak() - before
    return loads


def outcome(folder: Path) -> tuple[str, str]:
    """How a load ended, and what is wrong with that."""
    try:
        load(folder)
    except (ModelFormatError, TokenizerMissing) as error:
        names = str(folder) in str(error)
        return type(error).__name__, "" if names else f"the text names no file of the folder: {str(error)[:300]}"
    except BaseException as error:  # panics of Rust libraries are no Exceptions
        return type(error).__name__, f"{type(error).__name__}: {str(error)[:300]}"
    return "loaded", ""


def peak() -> int:
    """Most bytes that this process has held at once."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def mend(original: Path, damaged: Path) -> None:
    if damaged.is_dir():
        shutil.rmtree(damaged)
    shutil.copyfile(original, damaged)


# ---- ways to damage a file


def damage(rng: random.Random, path: Path) -> str:
    """Damages the file in one way, and says which."""
    ways: list[Callable[[random.Random, Path], None]] = [flip_bits, flip_bits, cut, overwrite, replace, remove]
    if path.suffix == ".json":
        ways += [edit_json] * 6
    if path.suffix == ".safetensors":
        ways += [edit_header] * 6
    way = rng.choice(ways)
    way(rng, path)
    return way.__name__


def flip_bits(rng: random.Random, path: Path) -> None:
    """Of safetensors rather in the header, which is what can be malformed."""
    data = bytearray(path.read_bytes())
    end = min(len(data), 4096) if rng.random() < 0.5 else len(data)
    for _ in range(rng.choice((1, 1, 8, 64)) if data else 0):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data) + 1), max(len(data) - 1, 0)))])


def overwrite(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = rng.choice((0, rng.randrange(len(data) + 1)))
    new = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(100), b"[" * 50_000))
    data[start:start + rng.choice((1, 8, 1000))] = new
    path.write_bytes(data)


def replace(rng: random.Random, path: Path) -> None:
    path.write_bytes(rng.choice((
        b"", b"null", b"[]", b"{}", b"[" * 200_000, b'{"a":' * 100_000, rng.randbytes(5000), b"\xef\xbb\xbf{}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"<html>404</html>",
        b"PK\x03\x04" + bytes(64),
    )))  # fmt: skip


def remove(rng: random.Random, path: Path) -> None:
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()


def edit_json(rng: random.Random, path: Path) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(edited(rng, value)))


def edit_header(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = json.dumps(edited(rng, json.loads(data[8:8 + size]))).encode()
    claimed = rng.choice((len(text),) * 8 + (0, len(text) - 1, len(text) + 1, 2**32, 2**63))
    path.write_bytes(claimed.to_bytes(8, "little") + text + data[8 + size:])


def edited(rng: random.Random, value: Any) -> Any:
    """`value` with one part of it, at any depth, replaced, removed, doubled or moved."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(HOSTILE)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys[:200])
    way = rng.random()
    if way < 0.1:
        del value[key]
    elif way < 0.2 and isinstance(value, dict):
        value[rng.choice(("", "\x00", "extra", str(key) * 2))] = value[key]
    elif way < 0.2:
        value.append(value[key])
    elif way < 0.3:
        other = rng.choice(keys[:200])
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = edited(rng, value[key])
    return value
