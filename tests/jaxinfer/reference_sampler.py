"""What a request must answer, token after token in NumPy; the model's logits follow from the last token alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.noise import gumbel, row_keys
from jaxinfer.testing import CountingModel
from jaxinfer.types import Request, SamplingParams, TokenRules
from jaxinfer.validation import stop_strings

VOCAB = 24

type Raw = Callable[[list[int]], np.ndarray]
"""All tokens so far to the model's logits f32[V]."""
type Legal = Callable[[list[int]], set[int]]
"""The tokens said to the ids that a grammar allows; none where the output must end."""


@cache
def table(seed: int) -> np.ndarray:
    """f32[V, V]: logits behind each last token."""
    return np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 1.5


@dataclass(frozen=True)
class TableModel(CountingModel):
    """Answers from a table; like its base it looks the last token up in the row's own page."""

    vocab_size: int = VOCAB
    every: int = 0
    """Behind such multiples it answers from another table; 0 never."""

    def logits(self, params, hidden):
        last = hidden[:, 0].astype(jnp.int32)
        right, wrong = jnp.asarray(table(0))[last], jnp.asarray(table(1))[last]
        return right if not self.every else jnp.where((last % self.every == 0)[:, None], wrong, right)


def by_table(tokens: list[int]) -> np.ndarray:
    return table(0)[tokens[-1]]


def answer(request: Request, index: int = 0, legal: Legal | None = None, spell: Callable[[list[int]], str] | None = None
           ) -> tuple[list[int], list[np.ndarray]]:
    """Tokens of a sample, and the raw logits f32[V] behind each.

    legal: of the request's grammar. spell: tokens to text, for stop strings.
    """
    said: list[int] = []
    while not is_over(request, said, legal, spell):
        said.append(next_token(by_table([*request.prompt, *said]), request, index, said, legal))
    return said, [by_table([*request.prompt, *said[:count]]) for count in range(len(said))]


def is_over(request: Request, said: list[int], legal: Legal | None = None,
            spell: Callable[[list[int]], str] | None = None) -> bool:
    """Whether nothing follows. Stop strings count in text behind the first `min_tokens`."""
    if len(said) >= request.max_tokens or (said and said[-1] in request.stop_ids):
        return True
    if said and legal is not None and not legal(said):
        return True
    if spell is None or len(said) <= request.params.min_tokens:
        return False
    text, before = spell(said), len(spell(said[:-1]))
    return any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in stop_strings(request.params))


def next_token(raw: np.ndarray, request: Request, index: int, said: list[int], legal: Legal | None = None) -> int:
    kept = candidates(raw, request, said, legal)
    if request.params.temperature == 0:
        return int(np.argmax(kept))
    return int(np.argmax(kept + noise(request.seed, index, len(request.prompt) + len(said), len(raw))))


def candidates(raw: np.ndarray, request: Request, said: list[int], legal: Legal | None = None) -> np.ndarray:
    """f32[V] from which the next token is taken: over the temperature, -inf where it cannot be said."""
    params, logits = request.params, raw.copy()
    if legal is not None:
        logits[sorted(set(range(len(raw))) - legal(said))] = -np.inf
    if request.rules is not None:
        logits = under_rules(logits, request.rules, request.prompt, said)
    if len(said) < params.min_tokens:
        logits[list(request.stop_ids)] = -np.inf
    if params.temperature == 0:
        return logits
    scaled = logits / np.float32(params.temperature)
    return np.where(scaled >= threshold(scaled, params), scaled, -np.inf)


def under_rules(raw: np.ndarray, rules: TokenRules, prompt: tuple[int, ...], said: list[int]) -> np.ndarray:
    logits = raw.copy()
    if rules.allowed is not None:
        logits[sorted(set(range(len(raw))) - set(rules.allowed))] = -np.inf
    for id_, value in rules.bias:
        logits[id_] += np.float32(value)
    for *beginning, last in rules.bad_words:
        if said[len(said) - len(beginning):] == beginning and len(said) >= len(beginning):
            logits[last] = -np.inf
    for id_ in {*prompt, *said}:
        factor = np.float32(rules.repetition_penalty)
        logits[id_] = logits[id_] / factor if logits[id_] > 0 else logits[id_] * factor
    for id_ in set(said):
        logits[id_] -= np.float32(rules.frequency_penalty) * said.count(id_) + np.float32(rules.presence_penalty)
    return logits


def threshold(scaled: np.ndarray, params: SamplingParams) -> float:
    """The least kept value: min-p and top-k, then top-p of what they left."""
    least = -math.inf
    if params.min_p > 0:
        least = scaled.max() + math.log(params.min_p)
    if params.top_k > 0:
        least = max(least, float(np.sort(scaled)[-params.top_k]))
    if params.top_p < 1:
        falling = np.sort(scaled[scaled >= least])[::-1].astype(np.float64)
        mass = np.cumsum(np.exp(falling - falling[0]))
        least = max(least, float(falling[np.searchsorted(mass, params.top_p * mass[-1])]))
    return least


@cache
def noise(seed: int, index: int, position: int, vocab_size: int = VOCAB) -> np.ndarray:
    """f32[V] of one sampled token."""
    words = jnp.array([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]], jnp.uint32)
    return np.asarray(_noise(words, jnp.array([index], jnp.int32), jnp.array([position], jnp.int32), vocab_size))[0]


_noise = jax.jit(lambda words, index, position, vocab_size: gumbel(row_keys(words, index), position, vocab_size),
                 static_argnums=3)
