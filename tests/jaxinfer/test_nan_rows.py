"""Rows that compute NaN or infinity end alone, say nothing made of it, and leave nothing in the prefix cache."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import VOCAB, counted, new_engine, new_executor, request, small_config
from counting_mixes import arrivals, check_answer, check_mix, ids_of, run, run_mix
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.errors import NumericFailure, status_of
from jaxinfer.executor import Executor
from jaxinfer.finite import are_finite, broken_rows
from jaxinfer.testing import CountingModel

POISON = 90
"""`arrivals` neither sends this token nor counts up to it."""


@dataclass(frozen=True)
class Poisonous(CountingModel):
    """Whose hidden state at POISON is `bad`, and with it the logits there; the tokens around it show nothing."""

    bad: float = np.nan

    def forward(self, params, tokens, positions, kv_pages, rows, *, max_q_len):
        hidden, pages = super().forward(params, tokens, positions, kv_pages, rows, max_q_len=max_q_len)
        return jnp.where(hidden == POISON, self.bad, hidden), pages

    def logits(self, params, hidden):
        return jnp.where(jnp.isfinite(hidden), super().logits(params, hidden), hidden)


def pair_executor(target: CountingModel, drafter: CountingModel) -> Executor:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    executor = Executor(DraftPair(target, DraftModel(drafter, 3)),
                        Pair(*jax.device_put((jnp.float32(0), jnp.float32(0)), place)),
                        small_config(num_speculative_tokens=3), place)
    executor.warm_up(workers=2, progress=lambda name: None)
    return executor


EXECUTORS = {
    "plain": lambda: new_executor(small_config(), Poisonous(VOCAB)),
    "speculating": lambda: pair_executor(Poisonous(VOCAB), CountingModel(VOCAB)),
}
COMPILED = cache(lambda name: EXECUTORS[name]())


@pytest.fixture(scope="module", params=EXECUTORS)
def executor(request):
    return COMPILED(request.param)


@pytest.fixture(scope="module", autouse=True)
def no_executors_behind_this_file():
    yield
    COMPILED.cache_clear()


@st.composite
def poisoned(draw):
    """Requests that must break, as those of `arrivals`: by a token of the prompt, or by counting up to it."""
    found = []
    for index in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 50))
        prompt = list(range(100, 100 + length))
        if draw(st.booleans()):
            prompt[draw(st.integers(0, length - 1))] = POISON
        else:
            prompt[-1] = POISON - draw(st.integers(1, 12))
        one = request(f"bad {index}", prompt, 30, arrival=float(draw(st.integers(0, 8))),
                      temperature=draw(st.sampled_from([0.0, 1.0])), logprobs=draw(st.sampled_from([None, 2])),
                      n=draw(st.sampled_from([1, 1, 2])))
        found.append((draw(st.integers(0, 12)), None, one))
    return found


@settings(max_examples=60)
@given(arrivals(), poisoned())
def test_broken_rows_end_alone_and_the_others_are_right(executor, mix, broken):
    engine = new_engine(executor)
    chunks, cancelled = run_mix(engine, mix + broken)
    for _, _, one in mix:
        for index in range(one.params.n):
            check_answer(one, index, chunks[one.id, index], one.id in cancelled, counted(one))
    for _, _, one in broken:
        for index in range(one.params.n):
            found = chunks[one.id, index]
            before = [] if POISON in one.prompt else list(range(one.prompt[-1] + 1, POISON + 1))
            assert ids_of(found) == before
            assert found[-1].finish_reason == "error" and isinstance(found[-1].error, NumericFailure)
            assert len(found[-1].logprobs or []) in (0, len(found[-1].token_ids))
    assert engine.scheduler.metrics.nan_rows == sum(one.params.n for _, _, one in broken)


@pytest.mark.parametrize("length", [33, 70])
def test_nothing_that_a_broken_row_computed_is_found_again(length, executor):
    """Also not the chunks before the one in which it broke."""
    engine = new_engine(executor)
    engine.add(request("bad", [*range(100, 99 + length), POISON], 5, temperature=0.0))
    assert isinstance(run(engine)["bad", 0][-1].error, NumericFailure)
    assert engine.scheduler.pool.num_idle == 0
    engine.add(request("good", range(100, 100 + length), 5, temperature=0.0, arrival=1.0))
    last = run(engine)["good", 0][-1]
    assert (last.finish_reason, last.stats.num_cached_tokens) == ("length", 0)


def test_pages_that_a_broken_row_took_over_are_distrusted(executor):
    """One of them may be why it broke, and would break whoever comes next."""
    engine = new_engine(executor)
    for index, (tail, cached) in enumerate([(7, 0), (8, 32), (POISON, 32), (9, 0)]):
        engine.add(request(str(index), [*range(100, 132), tail], 4, temperature=0.0, arrival=float(index)))
        chunks = run(engine)[str(index), 0]
        assert chunks[-1].stats.num_cached_tokens == cached
        assert (chunks[-1].error is not None) == (tail == POISON)


@settings(max_examples=30)
@given(arrivals())
def test_nan_of_a_draft_model_changes_no_answer(drafted_by_poison, mix):
    check_mix(new_engine(drafted_by_poison), mix)


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, None), (1.0, None), (1.0, 5)])
def test_nan_of_a_draft_model_is_laundered_into_no_token(drafted_by_poison, temperature, seed):
    engine = new_engine(drafted_by_poison)
    one = request("a", [POISON - 5], 30, temperature=temperature, given=seed)
    engine.add(one)
    chunks = run(engine)["a", 0]
    assert ids_of(chunks) == counted(one) and chunks[-1].finish_reason == "length"
    assert engine.scheduler.metrics.nan_rows == 0


@pytest.fixture(scope="module")
def drafted_by_poison():
    """Every second token's draft is NaN."""
    return pair_executor(CountingModel(VOCAB), EvenPoison(VOCAB))


@dataclass(frozen=True)
class EvenPoison(CountingModel):
    def logits(self, params, hidden):
        return jnp.where(hidden % 2 == 0, jnp.nan, super().logits(params, hidden))


def test_the_status_says_that_data_is_lost_and_not_that_the_server_is_gone():
    code, http, text = status_of(NumericFailure("the model computed NaN"))
    assert (code, http, text) == ("DATA_LOSS", 500, "the model computed NaN")


@settings(max_examples=50)
@given(st.data())
def test_rows_are_broken_where_any_of_their_own_tokens_is(data):
    lens = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    hidden = np.zeros((sum(lens) + 3, 4), np.float32)
    hidden[sum(lens):] = np.nan  # padding
    cu_q_lens = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    bad = [data.draw(st.booleans()) and length > 0 for length in lens]
    for row, first in enumerate(cu_q_lens[:-1]):
        if bad[row]:
            at = data.draw(st.integers(0, lens[row] - 1))
            hidden[first + at, data.draw(st.integers(0, 3))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    assert np.asarray(broken_rows(jnp.asarray(hidden), jnp.asarray(cu_q_lens))).tolist() == bad


def test_logits_of_which_one_is_nan_are_not_finite_but_a_forbidden_token_is():
    logits = np.zeros((4, 300), np.float32)
    logits[0, 250], logits[1, 3], logits[2, 7] = np.nan, np.inf, -np.inf
    assert np.asarray(are_finite(jnp.asarray(logits))).tolist() == [False, False, True, True]
