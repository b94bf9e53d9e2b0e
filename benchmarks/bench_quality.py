"""What int8 weights, int8 activations and pages of one byte cost in quality: bits per byte of the demo's target on text
that it was not trained on, each against bfloat16.

The text is what its training kept away: modules of Python's standard library chosen by the hash of their names, in
windows of 512 tokens from position 0 on, as `checkpoints.demo.train.evaluate` scores them. Every figure comes from a
serving engine: windows are prefilled in chunks of 128 tokens, so that most keys and values are read back from the
pages, and scored by `prompt_logprobs`. All contenders see the same windows; a ratio's noise is far below its value.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.report import Result, exit_code, report
from benchmarks.workloads import is_quick
from checkpoints import demo
from checkpoints.demo.train import bpe, corpus
from checkpoints.demo.train.config import CONTEXT
from jaxinfer import LLM, SamplingParams

WINDOWS_AT_ONCE = 2
"""A step holds one chunk."""

FLOOR, GOAL = 1.005, 1.001
"""Bits per byte over those of bfloat16."""

CONTENDERS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8 weights": {"quantization": "int8_weight_only"},
    "int8 weights and activations": {"quantization": "int8"},
    "int8 pages": {"kv_cache_dtype": "int8"},
    "fp8 pages": {"kv_cache_dtype": "fp8"},
    "int8 weights, activations and pages": {"quantization": "int8", "kv_cache_dtype": "int8"},
}


@dataclass(frozen=True, slots=True)
class Size:
    """context: tokens of a window, of which `chunk` are prefilled at once. Each `every`-th window is scored."""

    model: str
    context: int
    chunk: int
    every: int


FULL = Size("demo", CONTEXT, 128, 4)
QUICK = Size("demo-draft", 24, 8, 3000)


@dataclass(frozen=True, slots=True)
class Text:
    """Windows of ids: the first of each is given, the others are scored. num_bytes: of the scored text."""

    windows: list[list[int]]
    num_bytes: int


def held_out(size: Size) -> Text:
    """Windows of the held-out modules; the end-of-text mark behind a module is scored and has no byte."""
    tokenizer = Tokenizer.from_file(str(demo.path("target") / "tokenizer.json"))
    streams = [bpe.encode(tokenizer, [module]).tolist() for module in corpus.load().held_out]
    windows = [
        stream[start : start + size.context + 1]
        for stream in streams
        for start in range(0, len(stream) - 1, size.context)
    ][:: size.every]
    return Text(windows, sum(len(tokenizer.decode(window[1:]).encode()) for window in windows))


def bits_per_byte(size: Size, options: dict[str, Any], text: Text) -> float:
    """Of the model, served with `options`."""
    with LLM(
        size.model, dtype="bfloat16", max_model_len=size.context + 2, max_num_seqs=WINDOWS_AT_ONCE, quiet=True,
        max_num_batched_tokens=size.chunk, enable_prefix_caching=False, **options,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = llm.generate(text.windows, params, use_tqdm=False)
    pairs = zip(outputs, text.windows, strict=True)
    nats = -sum(scored(output.prompt_logprobs or [], window) for output, window in pairs)
    return nats / math.log(2) / text.num_bytes


def scored(logprobs: Sequence[Any], window: list[int]) -> float:
    """The sum of a window's log-probabilities, in nats."""
    return float(np.sum([entry[token].logprob for entry, token in zip(logprobs[1:], window[1:], strict=True)]))


def main() -> int:
    size = QUICK if is_quick(__doc__) else FULL
    text = held_out(size)
    found: dict[str, float] = {}
    for name, options in CONTENDERS.items():
        found[name] = bits_per_byte(size, options, text)
        print(f"{name}: {found[name]:.5f} bits per byte", file=sys.stderr, flush=True)
    whole = found["bfloat16"]
    results = [Result(f"{name}: bits per byte", value, "bits") for name, value in found.items()]
    results += [
        Result(f"{name}: over bfloat16", value / whole, "x", FLOOR, GOAL)
        for name, value in found.items()
        if name != "bfloat16"
    ]
    report("quality", results)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
