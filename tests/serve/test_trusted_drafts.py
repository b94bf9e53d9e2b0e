"""A drafter elsewhere that is trusted: what it samples truthfully changes no distribution, what it says wrongly is
taken as given, and requests that do not follow from its probabilities stay as they are.

The target counts: its next token has chance TRUE_CHANCE[1] at temperature 1, and all of it at STEADY.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import VOCAB, counted, request, small_config
from counting_mixes import ids_of, run
from remote_drafting import AHEAD, Counting, engine_of, new_executor
from serving import Served, serving
from test_draft_service import calling
from test_remote_drafts import client, drafting

from jaxinfer.core import Core, ModelInfo
from jaxinfer.draft_client import DraftClient
from jaxinfer.draft_distributions import Claimed
from jaxinfer.engine import Engine
from jaxinfer.engine_thread import EngineThread
from jaxinfer.executor import Executor
from jaxinfer.intake import Intake
from jaxinfer.page_pool import PagePool
from jaxinfer.protos.v1 import draft_pb2 as pb
from jaxinfer.remote_drafts import LIKELIEST, Proposal, Terms
from jaxinfer.scheduler import Scheduler
from jaxinfer.testing import CountingModel
from jaxinfer.validation import Limits

PEAK, STEADY = 6.0, 0.1
TRUE_CHANCE = np.array([1.0, np.exp(PEAK)]) / (np.exp(PEAK) + VOCAB - 1)  # of any other token, and of the next number
NUM_CANDIDATES = 5
# Quantile 1 - 1e-6 of chi-square with 2 degrees of freedom.
LIMIT = 27.6


@pytest.fixture(scope="module")
def executor() -> Executor:
    return new_executor(CountingModel(VOCAB, PEAK), NUM_CANDIDATES)


def engine(executor: Executor, source) -> Engine:
    return engine_of(executor, source, NUM_CANDIDATES)


def surprise(engine: Engine, rows: int = 40) -> float:
    """Chi-square of what free requests say after each token: the next number, one of the two behind it, another."""
    requests = [request(str(index), [index], 80, seed=index, arrival=float(index)) for index in range(rows)]
    for one in requests:
        engine.add(one)
    chunks = run(engine)
    steps = np.concatenate([np.diff([*one.prompt, *ids_of(chunks[one.id, 0])]) % VOCAB for one in requests])
    assert engine.metrics()["failed_steps"] == 0
    found = np.array([(steps == 1).sum(), ((steps == 2) | (steps == 3)).sum(), ((steps == 0) | (steps > 3)).sum()])
    wanted = len(steps) * np.array([TRUE_CHANCE[1], 2 * TRUE_CHANCE[0], (VOCAB - 3) * TRUE_CHANCE[0]])
    return float(((found - wanted) ** 2 / wanted).sum())


class Sampling(Counting):
    """Samples how far each token lies behind the one before, and says so; what it said stands while the row follows it.
    told: what it claims instead.
    """

    def __init__(self, chances: list[float], told: list[float] | None = None, late: int = 0):
        super().__init__(late)
        self._chances, self._claimed = chances, told or chances
        self._random = random.Random(1)
        self._said: dict[int, list[int]] = {}  # of each row, with what it has sampled behind it
        self.terms: list[Terms] = []

    def tell(self, name, position, tokens, terms=LIKELIEST):
        self.terms.append(terms)
        super().tell(name, position, tokens, terms)

    def answer(self, name: int, row: list[int]) -> Proposal:
        said = self._said.get(name, [])
        if said[:len(row)] != row:
            said = list(row)
        while len(said) < len(row) + AHEAD:
            (step,) = self._random.choices(range(1, len(self._chances) + 1), self._chances)
            said.append((said[-1] + step) % VOCAB)
        self._said[name], tokens = said, said[len(row):]
        ids = [(before + 1 + step) % VOCAB for before in (row[-1], *tokens[:-1]) for step in range(len(self._chances))]
        claimed = Claimed(AHEAD, len(self._chances), np.array(ids, np.int32),
                          np.array(self._claimed * AHEAD, np.float32))  # fmt: skip
        return Proposal(name, len(row), tuple(tokens), claimed)


@pytest.mark.parametrize(("chances", "late"), [([0.5, 0.3, 0.2], 0), ([0.5, 0.3, 0.2], 1), ([0.1, 0.8, 0.1], 0)])
def test_free_requests_follow_the_target(executor, chances, late):
    one = engine(executor, Sampling(chances, late=late))
    assert surprise(one) < LIMIT
    counts = one.metrics()["remote_proposals"]
    assert counts["distributions"] > 500 and counts["malformed_distributions"] == 0


def test_a_lie_fails_the_same_test(executor):
    assert surprise(engine(executor, Sampling([1.0, 0.0], told=[0.05, 0.95]))) > 10 * LIMIT


def test_greedy_and_seeded_requests_say_what_they_say_alone(executor):
    """And the drafter is asked for likely tokens there, without distributions."""
    def requests():
        return [request("greedy", range(9), 60, temperature=0.0), request("seeded", range(3), 60, given=5),
                request("salted", range(3), 60, given=6, salt="tenant")]  # fmt: skip

    source, answers = Sampling([0.5, 0.3, 0.2]), []
    for one in (engine(executor, source), engine(executor, Counting(late=1000))):
        for each in requests():
            one.add(each)
        chunks = run(one)
        answers.append([ids_of(chunks[each.id, 0]) for each in requests()])
    assert answers[0] == answers[1] and answers[0][1] != counted(requests()[1])
    assert set(source.terms) == {Terms(), Terms(0.0, "tenant")}


def test_terms_follow_from_the_request(executor):
    source = Sampling([1.0])
    one = engine(executor, source)
    one.add(request("free", range(3), 4, temperature=0.7, salt="a"))
    run(one)
    assert set(source.terms) == {Terms(0.7, "a")}
    source = Sampling([1.0])
    one = engine_of(executor, source)  # this one trusts nobody; it enters proposals without distributions
    one.add(request("free", range(3), 1, temperature=0.7, salt="a"))
    one.step()
    one.cancel("free")
    assert set(source.terms) == {Terms(0.0, "a")}
    one.drain()


def test_a_vocabulary_that_is_larger_hides_only_what_lies_behind(executor):
    source = Counting()
    one = engine(executor, source)
    one.add(request("one", [VOCAB - 3], 2, temperature=STEADY))
    source.answer = lambda name, row: Proposal(name, len(row), (VOCAB - 2, VOCAB, 0))  # type: ignore[method-assign]
    assert ids_of(run(one)["one", 0]) == [VOCAB - 2, VOCAB - 1]
    assert one.metrics()["remote_proposals"]["entered"] == 1


# Over a real channel.


@dataclass(frozen=True)
class Wrong:
    """A right proposal with distributions that `change` has spoilt, of ids [AHEAD][N] and probabilities likewise."""

    change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    num_candidates: int = 2

    def __call__(self, one: pb.DraftRequest) -> Iterator[pb.DraftResponse]:
        if one.ended:
            return
        tokens = (np.arange(1, AHEAD + 1) + one.token_ids[-1]) % VOCAB
        ids, chances = self.change(np.stack([tokens, (tokens + 1) % VOCAB], axis=1), np.full((AHEAD, 2), [0.75, 0.25]))
        yield pb.DraftResponse(
            sequence=one.sequence, position=one.position + len(one.token_ids), token_ids=tokens,
            num_candidates=self.num_candidates, candidate_ids=ids.ravel(), candidate_probabilities=chances.ravel())


def spoilt(field: int, value: float) -> Wrong:
    def change(*fields: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fields[field][:, 1] = value
        return fields[0], fields[1]

    return Wrong(change)


WRONG = {
    "nan": spoilt(1, np.nan), "infinite": spoilt(1, np.inf), "negative": spoilt(1, -0.25), "sum of 2": spoilt(1, 1.25),
    "id too large": spoilt(0, VOCAB), "id too small": spoilt(0, -1), "id of any size": spoilt(0, -(2**31)),
    "one id twice": Wrong(lambda ids, chances: (ids[:, [0, 0]], chances)),
    "not the token": Wrong(lambda ids, chances: (ids + 1, chances)),
    "too few": Wrong(lambda ids, chances: (ids[1:], chances)),
    "too many": Wrong(lambda ids, chances: (ids, np.concatenate([chances, chances]))),
    "nothing of what is announced": Wrong(lambda ids, chances: (ids[:0], chances[:0])),
    "another width": Wrong(lambda ids, chances: (ids, chances), 1),
    "any width": Wrong(lambda ids, chances: (ids, chances), 2**31 - 1),
}  # fmt: skip


class Trusting(DraftClient):
    def __init__(self, address: str, num_wanted: int):
        super().__init__(address, num_wanted, NUM_CANDIDATES)


def check_steady(executor: Executor, answer) -> dict:
    """Answers are exact; what became of the proposals."""
    with drafting(answer) as address, client(address, Trusting) as source:
        one = engine(executor, source)
        requests = [request("greedy", range(9), 60, temperature=0.0), request("free", range(3), 60, temperature=STEADY),
                    request("seeded", range(3), 60, temperature=STEADY, given=1)]  # fmt: skip
        for each in requests:
            one.add(each)
        chunks = run(one)
        assert [ids_of(chunks[each.id, 0]) for each in requests] == [counted(each) for each in requests]
        assert one.metrics()["failed_steps"] == 0
        return one.metrics()


@pytest.mark.parametrize("kind", WRONG)
def test_malformed_distributions_cost_speed_only(executor, kind):
    counts = check_steady(executor, WRONG[kind])["remote_proposals"]
    assert counts["malformed_distributions"] > 0 and counts["distributions"] == 0


@pytest.mark.parametrize("answer", [Wrong(lambda ids, chances: (ids, chances)),
                                    Wrong(lambda ids, chances: (ids, 0 * chances))], ids=["right", "not told"])
def test_distributions_that_are_none_are_no_fault(executor, answer):
    metrics = check_steady(executor, answer)
    assert metrics["remote_proposals"]["malformed_distributions"] == 0
    assert metrics["accepted_tokens"] == metrics["draft_tokens"] > 20


def test_distributions_are_asked_for_where_they_are_of_use(executor):
    asked: dict[int, pb.DraftRequest] = {}

    def remember(one):
        if one.position == 0 and one.token_ids:
            asked[one.token_ids[0]] = one
        yield from WRONG["nan"](one)

    with drafting(remember) as address, client(address, Trusting) as source:
        one = engine(executor, source)
        one.add(request("greedy", [1], 20, temperature=0.0))
        one.add(request("seeded", [2], 20, given=3, salt="b"))
        one.add(request("free", [3], 20, temperature=0.5, salt="c"))
        run(one)
    fields = {"temperature", "num_candidates", "cache_salt"}
    assert [{name for name in fields if asked[index].HasField(name)} for index in (1, 2, 3)] == [
        set(), {"cache_salt"}, fields]  # fmt: skip
    assert (asked[3].temperature, asked[3].num_candidates, asked[3].cache_salt) == (0.5, NUM_CANDIDATES, "c")


# The service, with a model of its own.


@dataclass(frozen=True)
class Guessing(CountingModel):
    """Its logits are those of a fixed table [V, V], in which the next number is likely, but not alone."""

    def logits(self, params, hidden):
        return jnp.asarray(guesses())[hidden[:, 0].astype(jnp.int32)]


def guesses() -> np.ndarray:
    noise = np.random.default_rng(2).normal(size=(VOCAB, VOCAB))
    ahead = (np.arange(VOCAB) - np.arange(VOCAB)[:, None]) % VOCAB
    return (noise + 4.0 * (ahead == 1) + 3.0 * (ahead == 2)).astype(np.float32)


@pytest.fixture(scope="module")
def drafter() -> Iterator[Served]:
    config = small_config()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    executor = Executor(Guessing(VOCAB), jax.device_put(jnp.float32(0), place), config, place)
    executor.warm_up(workers=2, progress=lambda name: None)
    thread = EngineThread(Engine(executor, Scheduler(config, PagePool(config.num_pages, config.page_size))), 100)
    info = ModelInfo("guessing", "counting", VOCAB, config.max_model_len, "int32", 1, (), False, False)
    intake = Intake(None, Limits(vocab_size=VOCAB, max_model_len=config.max_model_len))
    with serving(Core(info, intake, None, thread)) as served:
        yield served


def candidates_after(token: int, temperature: float) -> tuple[list[int], np.ndarray]:
    """What the drafter samples from behind it: its likeliest ids, and their probabilities."""
    logits = guesses()[token].astype(np.float64)
    ids = np.argsort(-logits)[:NUM_CANDIDATES]
    weights = np.exp(logits[ids] / temperature)
    return ids.tolist(), weights / weights.sum()


def test_the_probabilities_sent_are_those_sampled_from(drafter):
    temperature, places, hoped = 0.8, np.zeros(NUM_CANDIDATES), np.zeros(NUM_CANDIDATES)
    with calling(drafter) as caller:
        for sequence in range(24):
            caller.send(sequence, 0, [sequence], num_wanted=64, temperature=temperature, num_candidates=NUM_CANDIDATES)
        found: dict[int, pb.DraftResponse] = {}
        while len(found) < 24 or min(len(one.token_ids) for one in found.values()) < 64:
            one = caller.responses.get(timeout=20)
            found[one.sequence] = one
    for sequence, one in found.items():
        told = np.reshape(one.candidate_ids, (64, -1)), np.reshape(one.candidate_probabilities, (64, -1))
        for before, token, ids, chances in zip([sequence, *one.token_ids], one.token_ids, *told, strict=False):
            known, wanted = candidates_after(before, temperature)
            assert ids.tolist() == known
            np.testing.assert_allclose(chances, wanted, rtol=1e-4)
            places[known.index(token)] += 1
            hoped += wanted
    # Quantile 1 - 1e-6 of chi-square with 4 degrees of freedom; it exceeds that of draws that are not alike.
    assert ((places - hoped) ** 2 / hoped).sum() < 33.4
    assert ((places - hoped.mean()) ** 2 / hoped).sum() > 334


def test_the_service_drafts_for_an_engine_that_trusts_it(executor, drafter):
    """Both sides as they are, but that the engine lets the drafter think."""
    class Waiting(Trusting):
        def take(self):
            self.wait(0.1)
            return super().take()

    with client(drafter.server.address, Waiting) as source:
        one = engine(executor, source)
        assert surprise(one, rows=12) < LIMIT
    metrics = one.metrics()
    assert metrics["accepted_tokens"] > 0
    assert metrics["remote_proposals"]["distributions"] > 50
    assert metrics["remote_proposals"]["malformed_distributions"] == 0
