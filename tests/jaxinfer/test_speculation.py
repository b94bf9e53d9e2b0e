"""Speculation in the engine: every answer is what it is without it, whatever the drafter, and both models' pages agree.

Counting models first (answers are known beforehand, and each reads its own pages), then real ones.
"""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from counting import VOCAB, counted, new_engine, request, small_config
from counting_mixes import arrivals, check_mix, ids_of, run
from hypothesis import given, settings

from jaxinfer import loading, sharding
from jaxinfer.config import EngineConfig
from jaxinfer.draft_lengths import DraftLengths
from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.executor import Executor
from jaxinfer.models import make_decoder
from jaxinfer.params import init_params
from jaxinfer.prompt_lookup import PromptLookup
from jaxinfer.testing import CountingModel
from jaxinfer.types import SamplerForm, StepKind


@dataclass(frozen=True)
class Miscounting(CountingModel):
    """Counts wrong after every `wrong_each`-th token."""

    wrong_each: int = 1

    def logits(self, params, hidden):
        last = hidden[:, 0].astype(jnp.int32)
        step = jnp.where(last % self.wrong_each == 0, 2, 1)
        return self.peak * jax.nn.one_hot((last + step) % self.vocab_size, self.vocab_size, dtype=jnp.float32)


DRAFTERS = {"right": CountingModel(VOCAB), "wrong": Miscounting(VOCAB), "half": Miscounting(VOCAB, wrong_each=3)}


def counting_executor(drafter: str, **changes) -> Executor:
    config = small_config(num_speculative_tokens=3, **changes)
    pair = DraftPair(CountingModel(VOCAB), DraftModel(DRAFTERS[drafter], 3))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    executor = Executor(pair, Pair(*jax.device_put((jnp.float32(0), jnp.float32(0)), place)), config, place)
    executor.warm_up(workers=2, progress=lambda name: None)
    return executor


@pytest.fixture(scope="module")
def counting():
    """`counting_executor`, each compiled once."""
    return cache(counting_executor)


@pytest.fixture(scope="module", params=DRAFTERS)
def executor(request, counting):
    return counting(request.param)


@settings(max_examples=60)
@given(arrivals())
def test_any_mix_gives_each_request_its_own_answer(executor, mix):
    """Stop ids, minimum lengths, log-probabilities, priorities, cancels, preemption and prefix hits among them."""
    check_mix(new_engine(executor), mix)


class Fickle(DraftLengths):
    """Other numbers of proposals for every row and step; for all rows none in every third step."""

    steps = 0

    def choose(self, rows, rounds, form, ready=()):
        self.steps += 1
        for index, seq in enumerate(rows):
            seq.num_drafted = (self.steps + index) % (self.most + 1) if self.steps % 3 else 0


@settings(max_examples=40)
@given(arrivals())
def test_rows_may_draft_differently_or_not_at_all_in_every_step(executor, mix):
    check_mix(new_engine(executor, drafts=Fickle(3)), mix)


@pytest.mark.parametrize("seed", [None, 11])
def test_a_right_drafter_is_kept_whole(seed, counting):
    """k + 1 tokens a round, behind chunked prompts, prefix hits, mixed steps and rounds that kept everything."""
    engine = new_engine(counting("right", num_pages=200))
    results = record_results(engine)
    for index, (length, temperature) in enumerate([(1, 0.0), (40, 0.0), (40, 1.0), (9, 1.0), (45, 0.0)]):
        engine.add(request(str(index), range(length), 33, temperature=temperature, arrival=float(index), given=seed))
    chunks = run(engine)
    for index, length in enumerate((1, 40, 40, 9, 45)):
        assert ids_of(chunks[str(index), 0]) == [(length + offset) % VOCAB for offset in range(33)]
    decodes = [(plan, result) for plan, result in results if plan.kind is StepKind.DECODE]
    assert len(decodes) > 3
    for plan, result in decodes:
        for ids in result.tokens:
            # All proposals of all rounds, but for a row's last step: it ends there.
            assert len(ids) in (0, plan.num_rounds * 4) or ids[-1] in {(n + 32) % VOCAB for n in (1, 40, 9, 45)}


def record_results(engine):
    found, read = [], engine.runner.read

    class Recorder:
        dispatch, reset = engine.runner.dispatch, engine.runner.reset

        @staticmethod
        def read(step):
            result = read(step)
            found.append((step.plan, result))
            return result

    engine.runner = Recorder()
    return found


def test_few_pages_cost_proposals_not_requests(counting):
    """A pool in which a round of proposals hardly fits: rows fall back to one token a round, and all of them end."""
    engine = new_engine(counting("half"))
    results = record_results(engine)
    requests = [request(str(index), [index], 60, temperature=0.0, arrival=float(index)) for index in range(6)]
    for one in requests:
        engine.add(one)
    chunks = run(engine)
    assert [ids_of(chunks[one.id, 0]) for one in requests] == [counted(one) for one in requests]
    assert engine.scheduler.pool.num_held == 0
    drafted = [bool(plan.num_drafted) for plan, _ in results if plan.kind is StepKind.DECODE]
    assert any(drafted) and not all(drafted)


def test_rows_end_exactly_at_their_limits(counting):
    """One token left, stop ids in the middle of a round, max_tokens that cut a round, the model's last position."""
    engine = new_engine(counting("right", num_pages=200))
    requests = [request("one", [1, 2], 1), request("two", [1, 2], 2), request("stop", [10], 40, stop_ids=(17,)),
                request("cut", [20], 7), request("full", range(40), 56)]  # fmt: skip
    for one in requests:
        engine.add(one)
    chunks = run(engine)
    assert [ids_of(chunks[one.id, 0]) for one in requests] == [counted(one) for one in requests]


PAGE = 4


@pytest.fixture(scope="module")
def real(repository):
    """`real_executor`, each compiled once."""
    return cache(partial(real_executor, repository / "tests" / "data" / "parity" / "llama-tied"))


@dataclass(frozen=True)
class Poisoned(DraftModel):
    """What it has not computed is NaN. It catches up in chunks that end within pages."""

    num_caught_up = 6

    def new_state(self, num_pages, page_size):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), super().new_state(num_pages, page_size))


def real_executor(folder: Path, drafter: str | None, num_drafted: int = 0, shards: int = 1) -> Executor:
    """The target alone, with itself as its drafter, with one of random weights, or with prompt lookup ("ngram")."""
    mesh = sharding.make_mesh(shards) if shards > 1 else None
    loaded = loading.load_model(folder, dtype=jnp.float32, mesh=mesh)
    model: Any = make_decoder(loaded.config, dtype=jnp.float32, page_size=PAGE, mesh=mesh)
    config = EngineConfig(
        max_model_len=64, num_pages=60, page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=16, max_decode_rounds=4,
        num_speculative_tokens=num_drafted, token_buckets=(16,), row_buckets=(4,))  # fmt: skip
    params: Any = loaded.params
    if drafter == "ngram":
        lookup = PromptLookup(num_drafted, config.max_num_seqs, config.max_model_len, mesh)
        model, params = DraftPair(model, lookup), Pair(params, ())
    elif drafter is not None:
        other = params if drafter == "itself" else init_params(loaded.config, dtype=jnp.float32, mesh=mesh)
        model, params = DraftPair(model, Poisoned(model, num_drafted)), Pair(params, other)
    executor = Executor(model, params, config, sharding.sharding(mesh, jax.sharding.PartitionSpec()))
    executor.warm_up(workers=2, progress=lambda name: None)
    return executor


def answers(executor: Executor, requests, together: bool, drafts: DraftLengths | None = None) -> list[list[int]]:
    engine, found = new_engine(executor, drafts=drafts), {}
    for one in requests:
        engine.add(one)
        found |= {} if together else run(engine)
    found |= run(engine)
    return [ids_of(found[one.id, 0]) for one in requests]


@pytest.mark.parametrize(("drafter", "num_drafted", "shards"), [("itself", 5, 1), ("random", 3, 1), ("itself", 1, 2),
                                                               ("ngram", 4, 2)])
def test_seeded_and_greedy_output_is_that_without_speculation(real, drafter, num_drafted, shards):
    """Alone and in a full batch, for any number of proposals, a bad drafter, and on two devices."""
    requests = [
        request(str(index), [3 + (7 * index + 5 * i) % 250 for i in range(4 + index)], 24, given=index,
                temperature=0.0 if index % 3 == 0 else 0.9, arrival=float(index), top_k=0 if index % 2 else 40)
        for index in range(6)
    ]
    plain, speculating = answers(real(None), requests, together=False), real(drafter, num_drafted, shards)
    assert answers(speculating, requests, together=False) == plain
    assert answers(speculating, requests, together=True) == plain
    assert answers(speculating, requests, together=True, drafts=Fickle(num_drafted)) == plain


@pytest.mark.parametrize("given", [None, 3])
def test_the_draft_model_has_seen_all_of_every_row(real, given):
    """A drafter that is its target is kept whole, but for rounding: behind chunks, prefix hits and mixed steps."""
    engine = new_engine(real("itself", 5))
    results, shared = record_results(engine), [(11 * i) % 250 + 3 for i in range(20)]
    for index in range(8):
        prompt = [*shared[:4 * (index % 5)], index + 3, 5, 9]
        engine.add(request(str(index), prompt, 21, temperature=0.8 * (index % 2), arrival=float(index), given=given))
    run(engine)
    steps = [(plan, ids) for plan, result in results if plan.kind is StepKind.DECODE for ids in result.tokens]
    whole = sum(len(ids) == plan.num_rounds * 6 for plan, ids in steps)
    assert len(steps) > 20 and whole + 8 + 2 >= sum(bool(ids) for _, ids in steps)  # 8 rows end, 2 for rounding


class Sighted(DraftLengths):
    """The drafter sees the rows that `seen` names by how many began before; others only once `late` is set."""

    def __init__(self, most: int, seen: list[bool]):
        super().__init__(most)
        self._seen = iter(seen)
        self.catches_up = self.pauses = False

    def watches(self, seq, num_rows, num_unseen):
        return next(self._seen)

    def late(self, rows, rounds):
        return [seq for seq in rows if not seq.watched or seq.seen is not None] if self.catches_up else []

    def choose(self, rows, rounds, form, ready=()):
        for seq in rows:
            follows = seq in ready or (seq.watched and (seq.seen is None or not self.catches_up))
            seq.num_drafted = self.most * (follows and not self.pauses)


def test_rows_that_the_drafter_has_not_seen_are_not_drafted_for(real):
    """Their pages of it hold NaN, which reaches neither what they say nor what others say."""
    requests = [request(str(index), [(11 * i) % 250 + 3 for i in range(9 + index)], 24, given=5, arrival=float(index),
                        temperature=0.8 * (index % 2)) for index in range(8)]  # fmt: skip
    plain, drafts = answers(real(None), requests, together=False), Sighted(5, [True, False] * 4)
    engine, found = new_engine(real("itself", 5), drafts=drafts), {}
    results = record_results(engine)
    for one in requests:
        engine.add(one)
    found = run(engine)
    assert [ids_of(found[one.id, 0]) for one in requests] == plain
    drafted = [plan.num_drafted for plan, _ in results if plan.num_drafted]
    assert any(0 in counts and 5 in counts for counts in drafted)


@pytest.mark.parametrize("given", [None, 3])
def test_the_draft_model_catches_up_with_cached_pages(real, given):
    """The first row of each prefix is not seen; those that find its pages are, and what they are proposed is kept."""
    engine = new_engine(real("itself", 5), drafts=Sighted(5, [False, True, True, False, True, True]))
    results = record_results(engine)
    for index in range(6):
        prompt = [(11 * i + index // 3) % 250 + 3 for i in range(21)] + [index]
        engine.add(request(str(index), prompt, 41, temperature=0.8 * (index % 2), given=given))
        run(engine)
    caught_up = [(row.num_watched, len(row.tokens)) for plan, _ in results for row in plan.caught_up]
    assert caught_up == [(0, 20), (20, 20)] * 2
    check_all_is_kept(results, num_ends=4)


def test_the_draft_model_catches_up_with_rows_in_decode(real):
    """Rows begin unseen and decode; once the drafter has seen all that they said, all that it proposes is kept."""
    drafts = Sighted(5, [False] * 3)
    engine = new_engine(real("itself", 5), drafts=drafts)
    results = record_results(engine)
    for index in range(3):
        engine.add(request(str(index), [(7 * i + index) % 250 + 3 for i in range(10 + index)], 45, temperature=0.0))
    while len(results) < 4:
        engine.step()
    drafts.catches_up = True
    run(engine)
    told = [row for plan, _ in results for row in plan.caught_up]
    assert sorted(row.slot for row in told) == [0, 1, 2] and all(len(row.tokens) > 10 for row in told)
    check_all_is_kept(results, num_ends=3)


@pytest.mark.parametrize("given", [None, 3])
def test_the_draft_model_catches_up_with_what_plain_steps_said(real, given):
    """Rows begin seen, then steps go by without it; from the first token that it lacks on it is told."""
    drafts = Sighted(5, [True] * 3)
    engine = new_engine(real("itself", 5), drafts=drafts)
    results = record_results(engine)
    for index in range(3):
        engine.add(request(str(index), [(7 * i + index) % 250 + 3 for i in range(10 + index)], 50,
                           temperature=0.8 * (index % 2), given=given))
    drafts.pauses, rows = True, engine.scheduler._running
    while len(rows) < 3 or any(seq.seen is None or len(seq.tokens) < seq.seen + 5 for seq in rows):
        engine.step()
    drafts.pauses, drafts.catches_up = False, True
    run(engine)
    told = [row for plan, _ in results for row in plan.caught_up]
    assert sorted(row.slot for row in told) == [0, 1, 2]
    assert all(9 <= row.num_watched < len(row.tokens) - 3 for row in told)
    check_all_is_kept(results, num_ends=3)


def check_all_is_kept(results, *, num_ends: int) -> None:
    """Of rows with 5 proposals, but for the last step of each."""
    rows = [(len(ids), plan.num_rounds) for plan, result in results if plan.num_drafted
            for ids, drafted in zip(result.tokens, plan.num_drafted, strict=True) if ids and drafted]  # fmt: skip
    whole = sum(count == rounds * 6 for count, rounds in rows)
    assert whole >= 3 and whole + num_ends >= len(rows)


def test_measuring_rounds_leaves_an_engine_that_answers_right(real):
    """Each program is run with rows of its own, which share pages; afterwards nothing is left of them."""
    executor = real("itself", 1, 2)
    requests = [request("a", [5, 9, 17], 20, temperature=0.0), request("b", [7] * 9, 20, temperature=0.0)]
    before = answers(executor, requests, together=True)
    seconds = executor.measure_rounds()
    assert seconds.keys() == set(SamplerForm)
    assert all(list(by_size) == [4] and min(by_size[4].plain, by_size[4].one, by_size[4].most) > 0
               for by_size in seconds.values())  # fmt: skip
    assert answers(executor, requests, together=True, drafts=DraftLengths(1, seconds)) == before
