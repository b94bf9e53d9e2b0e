"""Prompt lookup: proposals against a search in NumPy, and every answer is what it is without it.

Answers go in circles of 8 tokens, so that they repeat what stands before; prompts also hold pairs that go on otherwise.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import VOCAB, counted, new_engine, request, small_config
from counting_mixes import arrivals, check_mix, ids_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_speculation import Fickle, record_results

from jaxinfer import round_seconds
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.drafter import Wanted
from jaxinfer.executor import Executor
from jaxinfer.prompt_lookup import BEFORE, CHUNK, LONGEST, NOTHING, SHORTEST, PromptLookup, following, latest_match
from jaxinfer.row_state import sampling_of
from jaxinfer.testing import CountingModel
from jaxinfer.types import SamplerForm, StepKind

CIRCLE, DRAFTED = 8, 3


class Circling(CountingModel):
    """Counts in circles."""

    def logits(self, params, hidden):
        return self.peak * jax.nn.one_hot(circled(hidden[:, 0].astype(jnp.int32)), self.vocab_size, dtype=jnp.float32)


def circled(last):
    """What follows."""
    return last // CIRCLE * CIRCLE + (last + 1) % CIRCLE


def executor_of(model: CountingModel, **changes) -> Executor:
    config = small_config(num_speculative_tokens=DRAFTED, **changes)
    pair = DraftPair(model, PromptLookup(DRAFTED, config.max_num_seqs, config.max_model_len))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    executor = Executor(pair, Pair(jax.device_put(jnp.float32(0), place), ()), config, place)
    executor.warm_up(workers=2, progress=lambda name: None)
    return executor


@pytest.fixture(scope="module")
def executor() -> Executor:
    return executor_of(Circling(VOCAB))


def in_circles(mix):
    """The same arrivals with prompts in circles; every second prompt that is not scored skips over each third token."""
    def prompt(one):
        steps = (1, 1, 2) if int(one.id) % 2 and one.params.prompt_logprobs is None else (1,)
        offsets = np.cumsum([0, *(steps * len(one.prompt))])[:len(one.prompt)]
        first = one.prompt[0] // CIRCLE * CIRCLE
        return tuple((first + offsets % CIRCLE).tolist())

    def stops(one, ids):
        return tuple(one.prompt[0] // CIRCLE * CIRCLE + stop % CIRCLE for stop in ids)

    return [(come, cancel, replace(one, prompt=prompt(one), stop_ids=stops(one, one.stop_ids)))
            for come, cancel, one in mix]  # fmt: skip


@settings(max_examples=60)
@given(mix=arrivals().map(in_circles))
def test_any_mix_gives_each_request_its_own_answer(executor, mix):
    """Stop ids, minimum lengths, log-probabilities, priorities, cancels, preemption and prefix hits among them."""
    check_mix(new_engine(executor), mix, partial(counted, following=circled))


@settings(max_examples=30)
@given(mix=arrivals().map(in_circles))
def test_rows_may_draft_differently_or_not_at_all_in_every_step(executor, mix):
    check_mix(new_engine(executor, drafts=Fickle(DRAFTED)), mix, partial(counted, following=circled))


def decodes_of(results):
    return [(plan, result) for plan, result in results if plan.kind is StepKind.DECODE]


@pytest.mark.parametrize("seed", [None, 11])
def test_text_that_repeats_itself_is_kept_whole(executor, seed):
    """k + 1 tokens a round, behind chunked prompts, prefix hits, mixed steps and rounds that kept everything."""
    engine = new_engine(executor)
    results = record_results(engine)
    for index, (length, temperature) in enumerate([(20, 0.0), (40, 0.0), (40, 1.0), (21, 1.0), (45, 0.0)]):
        prompt = [offset % CIRCLE for offset in range(length)]
        engine.add(request(str(index), prompt, 29, temperature=temperature, arrival=float(index), given=seed))
    run(engine)
    decodes = [(plan, result) for plan, result in decodes_of(results) if plan.num_drafted]
    assert len(decodes) > 3
    for plan, result in decodes:
        for ids, made in zip(result.tokens, result.made_counts, strict=True):
            # All proposals of all rounds, but for a row's last step: it ends there.
            assert len(made) < plan.num_rounds or made[-1] < DRAFTED or len(ids) == plan.num_rounds * (DRAFTED + 1)
    rounds = engine.scheduler.metrics.rounds_by_accepted
    assert rounds[DRAFTED] > 20 and rounds[0] == 0


def test_tokens_of_cached_pages_are_found(executor):
    """What the proposals repeat stands in pages that the second request takes over, and no step packs it."""
    engine = new_engine(executor)
    results = record_results(engine)
    prompt = [*range(CIRCLE), *range(100, 10, -10), 0, 1, 2]
    # The one in between takes the slot and leaves nothing of the first.
    for name, ids, count in (("first", prompt, 5), ("between", range(150, 190), 1), ("again", prompt, 5)):
        engine.add(request(name, ids, count, temperature=0.0))
        run(engine)
    assert [row[:3] for plan, _ in results for row in plan.caught_up] == [(0, 16, tuple(prompt[:16]))]
    assert [(result.tokens, result.made_counts) for _, result in decodes_of(results)] == [([[4, 5, 6, 7]], [[3]])] * 2


def test_only_proposals_that_were_made_are_counted(executor):
    engine = new_engine(executor)
    engine.add(request("new", range(40, 43), 5, temperature=0.0))
    run(engine)
    assert engine.scheduler.metrics.draft_tokens == 0
    engine.add(request("repeated", [0, 1, 2, 3, 9, 0, 1], 4, temperature=0.0))  # 3 9 is proposed behind 2: 4 comes
    run(engine)
    metrics = engine.scheduler.metrics
    assert (metrics.draft_tokens, metrics.accepted_tokens, dict(metrics.rounds_by_accepted)) == (2, 1, {1: 1})


def test_measured_rounds_make_all_proposals_and_leave_an_engine_that_answers_right(executor):
    executor.reset()
    seconds = executor.measure_rounds()
    assert seconds.keys() == set(SamplerForm)
    assert not executor.signature.state.kv_pages.draft.always
    signature, (device, *_) = executor.signature, jax.devices()
    rows, place = round_seconds.busy_rows(executor.config, signature.state.rows, device), signature.model.drafter
    slots, count = jnp.arange(4), jnp.array([3, 0, 2, 3])
    wanted = Wanted(slots, jnp.ones(4, bool), count, rows.page_table[:4], sampling_of(rows, slots))
    for on in (True, False):
        state = place.insist(place.new_state(1, 1), on)
        drafted, _ = place.propose(SamplerForm.GREEDY, None, state, replace(rows, kv_len=jnp.zeros(5, int)), wanted)
        np.testing.assert_array_equal(drafted.count, count * on)
    one = request("one", range(20), 20, temperature=0.0)
    engine = new_engine(executor, drafts=DraftLengths(DRAFTED, seconds))
    engine.add(one)
    assert ids_of(run(engine)["one", 0]) == counted(one, circled)


def searched(tokens: list[int]) -> int:
    """The last position of the latest of the longest earlier match of the newest tokens, -1 without one."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 2, length - 2, -1):
            if tokens[end - length + 1:end + 1] == tokens[len(tokens) - length:]:
                return end
    return -1


def copied(tokens: list[int], end: int, count: int) -> list[int]:
    longer = list(tokens)
    for index in range(count):
        longer.append(longer[end + 1 + index])
    return longer[len(tokens):]


compiled_match, compiled_following = jax.jit(latest_match), jax.jit(following, static_argnums=4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), alphabet=st.sampled_from([1, 2, 3, 6, 30]),
       lengths=st.lists(st.sampled_from([1, 2, 3, 4, 5, 9, 30, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK]),
                        min_size=3, max_size=3))  # fmt: skip
def test_proposals_are_those_of_a_plain_search(seed, alphabet, lengths):
    """Behind a row's end lie older tokens; rows are in any slots."""
    random = np.random.default_rng(seed)
    history = random.integers(0, alphabet, (5, BEFORE + 2 * CHUNK)).astype(np.int32)
    history[:, :BEFORE], slots = NOTHING, random.permutation(5)[:3]
    ends, found = map(np.asarray, compiled_match(jnp.asarray(history), jnp.asarray(slots), jnp.array(lengths)))
    proposed = compiled_following(jnp.asarray(history), jnp.asarray(slots), jnp.array(lengths), jnp.asarray(ends), 7)
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        tokens = history[slot, BEFORE:BEFORE + length].tolist()
        end = searched(tokens)
        assert found[row] == (end >= 0)
        if end >= 0:
            assert ends[row] == end
            assert proposed[row].tolist() == copied(tokens, end, 7)
