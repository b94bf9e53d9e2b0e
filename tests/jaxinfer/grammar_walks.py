"""Random outputs of a grammar: uniform over the legal tokens, then towards the end."""

import random

import numpy as np

from jaxinfer.grammar_matcher import Matcher
from jaxinfer.grammar_vocabulary import ids_of
from jaxinfer.types import mask_width

CLOSING = (b'"', b"}", b"]", b"null", b",", b":", b"0", b"1", b"-", b"a", b"x", b"y")
"""What brings JSON nearer to its end, best first."""


def legal(matcher: Matcher) -> list[int]:
    """The ids that may come next."""
    mask = np.zeros(mask_width(len(matcher.grammar.vocabulary.table.tokens)), np.uint32)
    matcher.fill_mask(mask)
    return ids_of(mask).tolist()


def walk(matcher: Matcher, rng: random.Random, num_free: int = 40, num_closing: int = 400) -> bytes | None:
    """The bytes of one output, ended by an end-of-sequence token; None where no end came in time."""
    tokens, text = matcher.grammar.vocabulary.table.tokens, []
    for step in range(num_free + num_closing):
        ids = legal(matcher)
        id = rng.choice(ids) if step < num_free else closest_to_the_end(ids, matcher, rng)
        matcher.advance([id])
        if id in matcher.grammar.vocabulary.eos_ids:
            return b"".join(text)
        text.append(tokens[id])
    return None


def closest_to_the_end(ids: list[int], matcher: Matcher, rng: random.Random) -> int:
    """The best legal closing token, now and then any of them: inside a string they are only characters."""
    vocabulary = matcher.grammar.vocabulary
    ranks = {vocabulary.table.tokens.index(token): rank for rank, token in enumerate(CLOSING)
             if token in vocabulary.table.tokens}
    ranks |= dict.fromkeys(vocabulary.eos_ids, -1)
    found = sorted((id for id in ids if id in ranks), key=ranks.__getitem__)
    return rng.choice(found[:1] if rng.random() < 0.8 else found) if found else rng.choice(ids)
