"""The features of the feature table in jaxinfer/README.md, and the table itself as it is read there."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxinfer.types import StructuredOutput

LETTERS = "abcdefghijklmnopqrstuvw"
EOS = len(LETTERS)
"""Ids below are letters."""
FIRST, SECOND = "abcde", "fghijklmnopqrstuvw"
PATTERN = f"([{FIRST}][{SECOND}])+"

REQUEST: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded sampling": {"temperature": 0.9, "seed": 5},
    "unseeded sampling": {"temperature": 0.9, "seed": None},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.15},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "logit_bias": {"logit_bias": {0: 3.0, 7: 3.0, 15: 3.0, 4: -2.0}},
    "allowed_token_ids": {"allowed_token_ids": [0, 2, 3, 4, 6, 8, 9, 11, 13, 14, 16, 18, 21, EOS]},
    "banned_token_ids": {"banned_token_ids": [2, 9, 14, 20]},
    "bad_words": {"bad_words": ["ad", "d", "gi", "sla", "j"]},
    "min_tokens": {"min_tokens": 12},
    "stop_token_ids": {"stop_token_ids": [3, 11]},
    "stop": {"stop": ["d", "mo", "i"]},
    "ignore_eos": {"ignore_eos": True},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "n": {"n": 2},
    "detokenize=False": {"detokenize": False},
    "structured_outputs": {"structured_outputs": StructuredOutput(regex=PATTERN)},
}
"""By their names in the table: what a request sets."""

ENGINE = ("draft model", "prompt lookup", "Medusa", "remote drafter", "chunked prefill", "prefix cache", "preemption",
          "tensor parallel", "int8 pages")  # fmt: skip

ENGINES: dict[str, dict[str, Any]] = {
    "draft model": {"draft_model": "draft"},
    "prompt lookup": {"speculation": "ngram"},
    "Medusa": {"speculation": "medusa", "draft_model": "heads"},
    "remote drafter": {"draft_address": "localhost:1"},
    "tensor parallel": {"tensor_parallel_size": 2},
    "int8 weights": {"quantization": "int8"},
    "int8 pages": {"kv_cache_dtype": "int8"},
    "fp8 pages": {"kv_cache_dtype": "fp8"},
    "chunked prefill": {"max_num_batched_tokens": 8},
    "prefix cache": {"enable_prefix_caching": True},
    "preemption": {"num_pages": 9},
    "constrained output": {},
}
"""By their names in the table of engine features: options of a start. Names of folders are of those in tests."""

WORKS, NOTHING, REFUSED, EXCLUDED = "+", "o", "x", "/"
"""What a cell may say; the README explains each."""

KEEP_TOKENS = {"logprobs", "prompt_logprobs", "n", "detokenize=False"}
"""They change what is told of the tokens of a sample, not the tokens."""
MODES = ("greedy", "seeded sampling", "unseeded sampling")


@dataclass(frozen=True, slots=True)
class Cell:
    row: str
    column: str
    says: str

    def __str__(self) -> str:
        return f"{self.row} x {self.column}"


def params_of(*names: str, seed: int = 1) -> dict[str, Any]:
    """Fields of a request with these features; where none of them says how to sample, seeded."""
    fields: dict[str, Any] = {"max_tokens": 20, "temperature": 0.9, "seed": seed}
    for name in names:
        fields |= REQUEST[name]
    if "seeded sampling" in names:
        fields["seed"] = seed
    return fields


def wanted_pairs() -> Iterator[tuple[str, str]]:
    """(row, column) of every cell that there must be: below the diagonal, and all columns of the engine's rows."""
    names = list(REQUEST)
    for number, row in enumerate(names):
        yield from ((row, column) for column in names[:number])
    yield from ((row, column) for row in ENGINE for column in names)


def wanted_engine_pairs() -> Iterator[tuple[str, str]]:
    """(row, column) of every cell of the second table, all below the diagonal."""
    names = list(ENGINES)
    for number, row in enumerate(names):
        yield from ((row, column) for column in names[:number])


def cells_of(text: str) -> list[Cell]:
    """The cells of the first table in a README. Raises ValueError where it is no table of the known features."""
    return cells_in(tables_of(text)[0], list(REQUEST))


def engine_cells_of(text: str) -> list[Cell]:
    """The cells of the second table: what an engine may have, against each other."""
    return cells_in(tables_of(text)[1], list(ENGINES))


def tables_of(text: str) -> list[list[str]]:
    """Lines of each table in the section."""
    lines = text.partition("## What goes together")[2].partition("\n## ")[0].splitlines()
    return [list(table) for is_table, table in groupby(lines, lambda line: line.startswith("|")) if is_table]


def cells_in(lines: list[str], names: list[str]) -> list[Cell]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    header, _, *rows = rows
    numbers = {number: name for number, name, *_ in rows if number}
    if list(numbers) != header[2:] or list(numbers.values()) != names:
        raise ValueError(f"columns {header[2:]} do not number the rows {numbers}")
    found = []
    for _, row, *cells in rows:
        found += [Cell(row, numbers[number], says) for number, says in zip(header[2:], cells, strict=False) if says]
    return found


def read_readme() -> str:
    return (Path(__file__).resolve().parents[2] / "jaxinfer" / "README.md").read_text()
