"""The corpus: the source of the running interpreter's standard library, without tests and tables of data."""

import hashlib
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "test_")
DATA_SHARE = 0.5
HELD_OUT_ONE_IN = 20
_SKIPPED = frozenset({tokenize.COMMENT, tokenize.NL})
_STATEMENT_ENDS = frozenset({tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT})
_LITERALS = frozenset({tokenize.STRING, tokenize.NUMBER})


class Module(NamedTuple):
    """One source file: its path below the standard library's folder (with "/") and its text."""

    name: str
    text: str


class Corpus(NamedTuple):
    """The modules to learn from and those kept away for evaluation, both in the order of their names."""

    train: list[Module]
    held_out: list[Module]


def excluded_by_name(relative: Path) -> bool:
    """Return whether the path names a test, something installed, or a file about the machine of the build."""
    if EXCLUDED_FOLDERS.intersection(relative.parts):
        return True
    return any(part.startswith(EXCLUDED_PREFIXES) for part in relative.parts)


def literal_share(text: str) -> float:
    """Return the share of the code's characters that lie in numbers and strings; comments and prose are left out.

    Prose is a string that starts a statement or has triple quotes: nearly always documentation.
    """
    literal = total = 0
    at_start = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _SKIPPED:
            continue
        prose = token.type == tokenize.STRING and (at_start or token.string.endswith(('"""', "'''")))
        at_start = token.type in _STATEMENT_ENDS
        if not prose and not at_start:
            total += len(token.string)
            literal += len(token.string) * (token.type in _LITERALS)
    return literal / max(total, 1)


def is_data(text: str) -> bool:
    """Return whether a source text is mostly a table: more than half of its code consists of literals."""
    return literal_share(text) > DATA_SHARE


def is_held_out(name: str) -> bool:
    """Decide by the SHA-256 of a module's path, so that the split depends on nothing else."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def modules(root: Path) -> Iterator[Module]:
    """Yield the modules below `root` that the rules above keep, ordered by name."""
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if excluded_by_name(relative):
            continue
        text = file.read_text(encoding="utf-8")
        if text.strip() and not is_data(text):
            yield Module(relative.as_posix(), text)


def load(root: Path | None = None) -> Corpus:
    """Read and split the corpus below `root`, by default the running interpreter's standard library."""
    split = Corpus([], [])
    for module in modules(root or Path(sysconfig.get_paths()["stdlib"])):
        (split.held_out if is_held_out(module.name) else split.train).append(module)
    return split
