"""Completions, to see what a model has learnt."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from checkpoints.demo.train.bpe import END_OF_TEXT_ID
from checkpoints.demo.train.config import ModelConfig
from checkpoints.demo.train.model import Params, forward

LENGTH = 128
# None ends in white space, which the tokenizer would cut off from the indentation that belongs to it.
PROMPTS = (
    ("import os\nimport sys\n\ndef main():", 0.0),
    ("class Stack:\n    def __init__(self):", 0.0),
    ("def read_lines(path):\n    with open(path) as f:", 0.7),
    ("# Return the larger of two numbers.\ndef", 0.7),
)


def complete(params: Params, config: ModelConfig, prompt: list[int], temperature: float, seed: int) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, up to `LENGTH` in all; the most likely ones at temperature zero."""
    rng = np.random.default_rng(seed)
    compiled = jax.jit(partial(forward, config=config, multiply=jnp.matmul))
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(prompt)] = prompt
    for position in range(len(prompt), LENGTH):
        logits = np.asarray(compiled(params, row)[0, position - 1])
        # The largest of the logits plus Gumbel noise is a sample of their softmax.
        token = int(np.argmax(logits + temperature * rng.gumbel(size=logits.shape)))
        if token == END_OF_TEXT_ID:
            return
        yield token
        row[0, position] = token


def samples(params: Params, config: ModelConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the prompts with their completions."""
    for seed, (prompt, temperature) in enumerate(PROMPTS):
        tokens = [END_OF_TEXT_ID, *tokenizer.encode(prompt).ids]
        tokens += complete(params, config, tokens, temperature, seed)
        yield f"--- temperature {temperature}\n{tokenizer.decode(tokens[1:])}"
