"""Tuned block sizes: data in `tuned/<operation>.json`, found by device and shape.

A file is `{"written": {how, by which versions, when}, "entries": [{"device": ..., "key": {...}, "blocks": {...}}]}`.
`device` is a device kind as jax names it ("TPU v5 lite"), or the beginning of several and a star: "TPU v5*" is the
default of a generation, "*" the general one. A key holds what the blocks were tuned for: words (a dtype, a form) and
sizes. `blocks` are the fields of the frozen dataclass that the kernel makes of it. An entry may say in `provenance` how
it was found, with which versions and when; `written` holds for those that do not. `python -m pallas_kernels.tune`
writes the files.

The rule of `lookup`, which is never an error: of the entries whose words equal the call's, those of the most specific
device count (the kind itself, then the longest beginning); of these the one nearest in size, by the sum of the
distances of the logarithms. What an entry's key leaves out fits every call.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

FOLDER = "tuned"


@dataclass(frozen=True)
class Entry:
    """Blocks for one device (or several) and one class of calls; see the file's description above."""

    device: str
    key: Mapping[str, str | int]
    blocks: Mapping[str, Any]
    provenance: str = ""

    def fits(self, device_kind: str, key: Mapping[str, str | int]) -> bool:
        beginning = self.device.removesuffix("*")
        of_device = device_kind.startswith(beginning) if self.device.endswith("*") else device_kind == self.device
        return of_device and all(key.get(name) == word for name, word in self.key.items() if isinstance(word, str))

    def distance(self, key: Mapping[str, str | int]) -> float:
        """In octaves, all sizes together; sizes that the call does not name cost nothing."""
        sizes = ((size, key.get(name)) for name, size in self.key.items() if not isinstance(size, str))
        return sum(abs(math.log2(size / wanted)) for size, wanted in sizes if isinstance(wanted, int) and wanted > 0)

    @property
    def specificity(self) -> tuple[bool, int]:
        """Orders devices: a kind before beginnings, long beginnings before short ones."""
        return not self.device.endswith("*"), len(self.device)


def lookup(operation: str, device_kind: str, **key: str | int) -> dict[str, Any] | None:
    """The blocks for a call, by the rule above; None where nothing fits (no file, no general entry).

    Args:
      operation: name of the file.
      device_kind: of `dispatch.current_device()`.
      key: words and sizes of the call, as the operation's file names them.
    """
    return nearest(read(operation), device_kind, key)


def nearest(entries: Iterable[Entry], device_kind: str, key: Mapping[str, str | int]) -> dict[str, Any] | None:
    """`lookup` in given entries; of equally near ones the first."""
    fitting = [entry for entry in entries if entry.fits(device_kind, key)]
    if not fitting:
        return None
    most = max(entry.specificity for entry in fitting)
    chosen = min((entry for entry in fitting if entry.specificity == most), key=lambda entry: entry.distance(key))
    return dict(chosen.blocks)


@functools.cache
def read(operation: str) -> tuple[Entry, ...]:
    """The entries of an operation; empty where it has no file."""
    path = resources.files("pallas_kernels") / FOLDER / f"{operation}.json"
    if not path.is_file():
        return ()
    return tuple(Entry(**entry) for entry in json.loads(path.read_text())["entries"])


def write(path: Path, entries: Iterable[Entry], written: Mapping[str, str]) -> None:
    """Writes a file of entries, one a line, sorted by device and key. written: how, with which versions, when."""
    ordered = sorted(
        entries,
        key=lambda entry: (entry.device, sorted((name, str(value).zfill(9)) for name, value in entry.key.items())),
    )
    fields = ({name: value for name, value in asdict(entry).items() if value != ""} for entry in ordered)
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in fields)
    path.write_text(f'{{\n  "written": {json.dumps(dict(written))},\n  "entries": [\n{lines}\n  ]\n}}\n')


def merge(path: Path, entries: Iterable[Entry], written: Mapping[str, str]) -> None:
    """Writes entries into a file, in place of those for the same device and key; all others stay as they are.

    written: for a new file; a file that exists keeps its own.
    """
    new = tuple(entries)
    old: tuple[Entry, ...] = ()
    if path.is_file():
        content = json.loads(path.read_text())
        written, old = content["written"], tuple(Entry(**entry) for entry in content["entries"])
    kept = (entry for entry in old if not any((entry.device, entry.key) == (one.device, one.key) for one in new))
    write(path, (*kept, *new), written)
