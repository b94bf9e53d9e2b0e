"""What is asked: prompts and how long their outputs may be. Text is not tokenised here: the server counts."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.core import ModelInfo
from jaxinfer.errors import InvalidConfig
from serve.bench.config import BenchConfig

FILE_OUTPUT_LEN = 256
"""Where neither the file nor --output-len says anything; vLLM's own for such files."""


@dataclass(frozen=True, slots=True)
class Sample:
    """prompt: as serve.client takes it. answer: a text whose tokens say how long the output is to be; None: output_len
    does.
    """

    prompt: Any
    output_len: int
    answer: str | None = None


def random_samples(config: BenchConfig, info: ModelInfo, num: int) -> list[Sample]:
    """Token ids drawn evenly from all but end-of-sequence, behind one prefix that all prompts share.

    Raises InvalidConfig where the model is too short for them.
    """
    rng = random.Random(f"prompts {config.seed}")  # noqa: S311 - a load, not a secret
    ids = [id for id in range(info.vocab_size) if id not in info.eos_token_ids] or [0]
    prefix = rng.choices(ids, k=config.random_prefix_len)
    shortest = 0 if prefix else 1

    def length(middle: int, least: int) -> int:
        ratio = config.random_range_ratio
        return max(rng.randint(math.floor(middle * (1 - ratio)), math.ceil(middle * (1 + ratio))), least)

    found = [
        Sample(prefix + rng.choices(ids, k=length(config.random_input_len, shortest)),
               config.output_len or length(config.random_output_len, 1))
        for _ in range(num)
    ]
    longest = max(len(one.prompt) + one.output_len for one in found)
    if longest > info.max_model_len:
        raise InvalidConfig("random_input_len", f"prompts and their outputs would have up to {longest} tokens; "
                            f"{info.name} takes {info.max_model_len}; ask for less of --random-input-len or "
                            "--random-output-len")
    return found


def file_samples(config: BenchConfig, num: int) -> list[Sample]:
    """Shuffled by the seed; a file with fewer prompts is gone through again. Raises InvalidConfig, OSError."""
    path = config.dataset_path or ""
    found = sharegpt_samples(path, config) if config.dataset == "sharegpt" else custom_samples(path, config)
    if not found:
        raise InvalidConfig("dataset_path", f"{path} has no prompts")
    random.Random(f"order {config.seed}").shuffle(found)  # noqa: S311
    return [found[number % len(found)] for number in range(num)]


def custom_samples(path: str, config: BenchConfig) -> list[Sample]:
    """Lines of JSON objects: prompt (text, token ids or chat messages) and perhaps output_tokens."""
    found = []
    for number, line in enumerate(read(path).splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            entry = parsed(line, where)
            if not isinstance(entry, dict) or not is_prompt(entry.get("prompt")):
                raise InvalidConfig("dataset_path", f'{where}: needs an object with "prompt": text, a list of token '
                                    "ids or a list of chat messages")
            length = entry.get("output_tokens", FILE_OUTPUT_LEN)
            if type(length) is not int or length < 1:
                raise InvalidConfig("dataset_path", f"{where}: output_tokens must be an integer of at least 1, got "
                                    f"{length!r}")
            found.append(Sample(entry["prompt"], config.output_len or length))
    return found


def sharegpt_samples(path: str, config: BenchConfig) -> list[Sample]:
    """Each conversation's first text, to be answered as long as its second is; shorter conversations are left out."""
    entries = parsed(read(path), path)
    if not isinstance(entries, list):
        raise InvalidConfig("dataset_path", f"{path}: needs a JSON list of conversations")
    found = []
    for entry in entries:
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        texts = [turn.get("value") for turn in turns or [] if isinstance(turn, dict)][:2]
        if len(texts) == 2 and all(isinstance(text, str) and text for text in texts):
            answer = None if config.output_len else texts[1]
            found.append(Sample(texts[0], config.output_len or FILE_OUTPUT_LEN, answer))
    return found


def is_prompt(value: Any) -> bool:
    """Whether serve.client would take it."""
    if isinstance(value, str) or not isinstance(value, list):
        return isinstance(value, str) and value != ""
    return bool(value) and (all(type(one) is int for one in value) or all(is_message(one) for one in value))


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"role", "content"} and all(
        isinstance(text, str) for text in value.values())


def read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidConfig("dataset_path", f"{path} is not UTF-8 text: {error}") from None


def parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidConfig("dataset_path", f"{where}: is not JSON: {error}") from None
