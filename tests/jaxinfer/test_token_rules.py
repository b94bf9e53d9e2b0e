"""Penalties, bias, allowed and banned ids, bad words: from parameters to rules. `test_feature_table.py` runs them."""

import numpy as np
import pytest
from reference_sampler import VOCAB

from jaxinfer.errors import InvalidRequest
from jaxinfer.token_rules import rules_of
from jaxinfer.types import MAX_BAD_WORD_TOKENS, SamplingParams, TokenRules
from jaxinfer.validation import normalise

WORDS = {"bad": [7], " bad": [8], "worse": [1, 2], " worse": [3, 2], "same": [4, 5], " same": [9, 4, 5],
         "long": list(range(MAX_BAD_WORD_TOKENS + 1)), " long": [1]}  # fmt: skip


def rules(stop_ids=(), **params) -> TokenRules | None:
    return rules_of(normalise(SamplingParams(**params)), stop_ids, VOCAB, WORDS.__getitem__)


def test_parameters_without_rules_have_none():
    assert rules(temperature=0.3, top_k=5, min_tokens=2) is None
    assert rules(logit_bias={}, banned_token_ids=None, bad_words=[]) is None


def test_bad_words_of_one_token_are_banned_ids():
    found = rules(bad_words=["bad", "worse"], logit_bias={5: 2, 7: 1.5}, banned_token_ids=[8, 11])
    assert found is not None
    assert found.bad_words == ((1, 2), (3, 2))
    assert found.bias == ((5, 2.0), (7, 1.5), (8, -np.inf), (11, -np.inf), (7, -np.inf))


def test_a_spelling_that_ends_in_the_other_is_not_kept_twice():
    found = rules(bad_words=" same ")
    assert found is not None and found.bad_words == ((4, 5),)


@pytest.mark.parametrize(("params", "field", "other"), [
    ({"bad_words": ["long"]}, "bad_words", str(MAX_BAD_WORD_TOKENS)),
    ({"allowed_token_ids": [7, 9], "bad_words": "bad", "banned_token_ids": [9]}, "allowed_token_ids", "banned"),
    ({"allowed_token_ids": [2, 5], "bad_words": ["worse", "same"]}, "allowed_token_ids", "bad_words"),
    ({"banned_token_ids": list(range(VOCAB))}, "banned_token_ids", "nothing else"),
    ({"allowed_token_ids": [0], "min_tokens": 1, "stop_ids": (0,)}, "allowed_token_ids", "min_tokens"),
])  # fmt: skip
def test_rules_that_may_leave_no_token_are_refused(params, field, other):
    with pytest.raises(InvalidRequest, match=other) as caught:
        rules(**params)
    assert caught.value.field == field
