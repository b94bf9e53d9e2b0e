"""What constrained output costs the host: masks of a step, the tokens taken in, compiling.

64 rows walk through the same JSON schema, each on its own random way. Every string is bounded, so that none stays in
one, and a row that ends begins anew. The vocabularies are the demo's 4,096 ids and a made-up one of the size of today's
large models. The first steps, in which the shared lexer learns the schema, are left out of the median and show in the
slowest step. While the device runs a step, the masks of the next have that long.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import checkpoints.demo
from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import is_quick
from jaxinfer.grammar import CompiledGrammar, Grammars
from jaxinfer.grammar_masks import MaskFiller
from jaxinfer.grammar_matcher import Matcher
from jaxinfer.grammar_vocabulary import ids_of
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import StructuredOutput, mask_width

NUM_ROWS, LARGE = 64, 131_072
FLOOR_US, GOAL_US = 10_000.0, 2_000.0
"""Microseconds a step of 64 rows at 4,096 ids."""

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.[a-z]{2,3}$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {"type": "object", "properties": {"street": {"type": "string", "maxLength": 30},
                                                      "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                    "required": ["street", "zip"]},
    },
    "required": ["name", "age", "email", "tags", "address"],
}


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level, with words of two to nine letters behind a space or not, and one special token at the end."""
    rng = random.Random(0)
    vocab = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    while len(vocab) < vocab_size - 1:
        word = "".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9)))
        vocab.setdefault(rng.choice(("", "\u0120")) + word, len(vocab))
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>"})


def measured(name: str, tokenizer: Tokenizer, num_steps: int, marks: tuple[float | None, float | None]) -> list[Result]:
    """One vocabulary. marks: floor and goal of the masks of a step."""
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id or 0])
    start = seconds(grammars.start)
    wanted = StructuredOutput(json=SCHEMA)
    compile_seconds = seconds(lambda: grammars.compile(wanted))
    masks, advances = steps(grammars.compile(wanted), num_steps, tokenizer.vocab_size)
    grammars.close()
    usual = statistics.median(masks[num_steps // 4:])
    return [
        Result(f"{name}: masks of {NUM_ROWS} rows, a step", usual * 1e6, "us", *marks),
        Result(f"{name}: masks of {NUM_ROWS} rows, slowest step", max(masks) * 1e6, "us"),
        Result(f"{name}: taking a token of {NUM_ROWS} rows", statistics.median(advances) * 1e6, "us"),
        Result(f"{name}: compiling a schema of {len(SCHEMA['properties'])} properties", compile_seconds * 1e3, "ms"),
        Result(f"{name}: start", start, "s"),
    ]


def steps(grammar: CompiledGrammar, num_steps: int, vocab_size: int) -> tuple[list[float], list[float]]:
    """Seconds that each step's masks took, and the tokens that followed."""
    rng, filler = random.Random(0), MaskFiller()
    rows = [grammar.matcher() for _ in range(NUM_ROWS)]
    out = np.zeros((NUM_ROWS, mask_width(vocab_size)), np.uint32)
    masks, advances = [], []
    for _ in range(num_steps):
        masks.append(seconds(partial(filler.fill, rows, out)))
        tokens = [int(rng.choice(ids_of(mask))) for mask in out]
        advances.append(seconds(partial(take, rows, tokens)))
        rows = [grammar.matcher() if row.is_finished else row for row in rows]
    return masks, advances


def take(rows: Sequence[Matcher], tokens: Sequence[int]) -> None:
    for row, token in zip(rows, tokens, strict=True):
        row.advance((token,))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> int:
    quick = is_quick(__doc__)
    demo = Tokenizer.from_folder(checkpoints.demo.path("target"))
    num_steps, large = (12, 8192) if quick else (200, LARGE)
    found = [*measured("V 4096", demo, num_steps, (FLOOR_US, GOAL_US)),
             *measured(f"V {large}", made_up_tokenizer(large), num_steps, (None, None))]
    report("grammar", found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
