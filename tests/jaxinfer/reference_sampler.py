"""What a request must answer, token after token in NumPy; the model's logits follow from the last token alone."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.noise import gumbel, row_keys
from jaxinfer.testing import CountingModel
from jaxinfer.types import Request, SamplingParams, TokenRules

VOCAB = 24


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


def answer(request: Request, index: int = 0) -> tuple[list[int], list[np.ndarray]]:
    """Tokens of a sample, and the raw logits f32[V] behind each."""
    logits, said, found = table(0), [], []
    while len(said) < request.max_tokens and not (said and said[-1] in request.stop_ids):
        raw = logits[(*request.prompt, *said)[-1]]
        said.append(next_token(raw, request, index, said))
        found.append(raw)
    return said, found


def next_token(raw: np.ndarray, request: Request, index: int, said: list[int]) -> int:
    params = request.params
    logits = raw if request.rules is None else under_rules(raw, request.rules, request.prompt, said)
    if len(said) < params.min_tokens:
        logits = logits.copy()
        logits[list(request.stop_ids)] = -np.inf
    if params.temperature == 0:
        return int(np.argmax(logits))
    scaled = logits / np.float32(params.temperature)
    kept = np.where(scaled >= threshold(scaled, params), scaled, -np.inf)
    return int(np.argmax(kept + noise(request.seed, index, len(request.prompt) + len(said))))


def under_rules(raw: np.ndarray, rules: TokenRules, prompt: tuple[int, ...], said: list[int]) -> np.ndarray:
    logits = raw.copy()
    if rules.allowed is not None:
        logits[[id_ for id_ in range(VOCAB) if id_ not in rules.allowed]] = -np.inf
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


def noise(seed: int, index: int, position: int) -> np.ndarray:
    """f32[V] of one sampled token."""
    words = jnp.array([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]], jnp.uint32)
    return np.asarray(_noise(words, jnp.array([index], jnp.int32), jnp.array([position], jnp.int32)))[0]


_noise = jax.jit(lambda words, index, position: gumbel(row_keys(words, index), position, VOCAB))
