"""Penalties, bias, allowed and banned ids, bad words: the engine against a reference, with and without drafts."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
from counting import new_engine, request, small_config
from counting_mixes import ids_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_sampler import VOCAB, TableModel, answer

from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.errors import InvalidRequest
from jaxinfer.executor import Executor
from jaxinfer.token_rules import rules_of
from jaxinfer.types import MAX_BAD_WORD_TOKENS, SamplingParams, TokenRules
from jaxinfer.validation import normalise

DRAFTERS = {"none": None, "a model that is often right": TableModel(every=3)}


@cache
def executor(drafter: str) -> Executor:
    """No room for every row, so that some are preempted and their rules entered again."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params, draft = jax.device_put((np.float32(0), np.float32(0)), place)
    model, config = TableModel(), small_config(max_decode_rounds=3)
    if DRAFTERS[drafter] is not None:
        model = DraftPair(model, DraftModel(DRAFTERS[drafter], 3))
        params, config = Pair(params, draft), dataclasses.replace(config, num_speculative_tokens=3)
    made = Executor(model, params, config, place)
    made.warm_up(workers=2, progress=lambda name: None)
    return made


ids = st.integers(0, VOCAB - 1)
ruled = st.builds(
    TokenRules,
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.7, 0.6]),
    bias=st.dictionaries(ids, st.sampled_from([4.0, -3.0, -np.inf]), max_size=5).map(lambda one: tuple(one.items())),
    allowed=st.one_of(st.none(), st.sets(ids, min_size=12).map(tuple)),
    bad_words=st.lists(st.lists(ids, min_size=2, max_size=4).map(tuple), max_size=6, unique=True).map(tuple),
)


@st.composite
def requests(draw):
    """Short answers over few tokens, so that rules are often the ones that decide. With a seed where it samples."""
    found = []
    for index in range(draw(st.integers(1, 7))):
        prompt = draw(st.lists(ids, min_size=1, max_size=20))
        sampled = draw(st.booleans())
        stop_ids = draw(st.sampled_from([(), (3, 17)]))
        max_tokens = draw(st.integers(1, 20))
        one = request(
            str(index), prompt, max_tokens, stop_ids=stop_ids, arrival=float(index), given=draw(st.integers(0, 9)),
            temperature=0.9 if sampled else 0.0, top_k=draw(st.sampled_from([0, 5])) * sampled,
            min_tokens=draw(st.integers(0, max_tokens)), n=draw(st.sampled_from([1, 1, 2])),
            logprobs=draw(st.sampled_from([None, None, 2])))
        rules = draw(st.one_of(st.none(), ruled))
        if rules is not None and leaves_a_token(rules, stop_ids):
            one = dataclasses.replace(one, rules=rules)
        found.append(one)
    return found


def leaves_a_token(rules: TokenRules, stop_ids: tuple[int, ...]) -> bool:
    never = {id_ for id_, value in rules.bias if value == -np.inf} | {word[-1] for word in rules.bad_words}
    return bool(set(range(VOCAB) if rules.allowed is None else rules.allowed) - never - set(stop_ids))


@pytest.mark.parametrize("drafter", DRAFTERS)
@settings(max_examples=40)
@given(mix=requests())
def test_every_answer_follows_its_own_rules(drafter, mix):
    """The same tokens with a drafter as without, since every row is greedy or has a seed."""
    engine = new_engine(executor(drafter))
    for one in mix:
        engine.add(one)
    chunks = run(engine)
    for one in mix:
        for index in range(one.params.n):
            wanted, raw = answer(one, index)
            assert ids_of(chunks[one.id, index]) == wanted
            if one.params.logprobs is not None:
                check_scores([entry for chunk in chunks[one.id, index] for entry in chunk.logprobs], raw)


def check_scores(entries, raw):
    """Log-probabilities are the model's own, before any rule."""
    for entry, logits in zip(entries, raw, strict=True):
        exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
        assert abs(entry.logprob - exact[entry.token_id]) < 1e-5
        assert [id_ for id_, _ in entry.top] == np.argsort(-logits)[:2].tolist()


def test_rules_come_back_after_preemption():
    """The books of a row that is recomputed start from what it has said."""
    engine = new_engine(executor("none"))
    rules = TokenRules(frequency_penalty=0.9, repetition_penalty=1.3, bad_words=((1, 2), (4, 5, 6)))
    mix = [dataclasses.replace(request(str(index), range(index, index + 12), 60, arrival=float(index),
                                       temperature=0.0), rules=rules) for index in range(4)]  # fmt: skip
    for one in mix:
        engine.add(one)
    chunks = run(engine)
    assert engine.scheduler.metrics.preemptions > 0
    for one in mix:
        assert ids_of(chunks[one.id, 0]) == answer(one)[0]


def test_a_slot_forgets_the_rules_of_the_row_before():
    engine = new_engine(executor("none"))
    prompt = list(range(8))
    for number in range(6):
        rules = TokenRules(allowed=(number,)) if number % 2 else None
        one = dataclasses.replace(request(str(number), prompt, 6, temperature=0.0, arrival=float(number)), rules=rules)
        engine.add(one)
        assert ids_of(run(engine)[str(number), 0]) == answer(one)[0]


# ---- from parameters to rules

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
