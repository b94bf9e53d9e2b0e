"""Both rules of acceptance: the distribution they promise, for good, bad and lying drafters, and the output they keep.

Every path is drawn DRAWS times over a vocabulary of 10 and held against the target's own distribution by chi-square;
rules that are broken on purpose must fail the very same test.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import acceptance
from jaxinfer.acceptance import Candidates, Drafted, accept, draft_rows
from jaxinfer.noise import row_keys
from jaxinfer.sampling import SamplingRows, distribution, sample
from jaxinfer.types import MAX_STOP_IDS, SamplerForm

VOCAB = 10
DRAWS = 100_000
# Quantile 1 - 1e-6 of chi-square with 9 degrees of freedom: the draws are fixed by their seeds.
LIMIT = 45.1
DRAFTERS = {"perfect": 0.0, "good": 0.7, "bad": 4.0}
SAMPLERS = {"plain": {}, "filtered": {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.02}}


def make_rows(count: int, *, seeded: bool = False, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
              min_p: float = 0.0, min_position: int = 0, stop_ids: tuple[int, ...] = ()) -> SamplingRows:  # fmt: skip
    def full(value, dtype):
        return jnp.full(count, value, dtype)

    words = jnp.stack([jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32)], axis=1)
    stops = jnp.full((count, MAX_STOP_IDS), -1, jnp.int32).at[:, :len(stop_ids)].set(jnp.array(stop_ids, jnp.int32))
    return SamplingRows(
        row_keys(words, jnp.zeros(count, jnp.int32)), full(seeded, bool), full(temperature, jnp.float32),
        full(top_k, jnp.int32), full(top_p, jnp.float32), full(min_p, jnp.float32), full(min_position, jnp.int32),
        stops)  # fmt: skip


def target_logits(width: int) -> np.ndarray:
    """f32[width, V]: another distribution at every position."""
    return (np.random.default_rng(5).normal(size=(width, VOCAB)) * 1.3).astype(np.float32)


def off_by(logits: np.ndarray, error: float) -> np.ndarray:
    return (logits + error * np.random.default_rng(6).normal(size=logits.shape)).astype(np.float32)


def expected(logits: np.ndarray, **fields) -> np.ndarray:
    """Probabilities f64[V] of one position, after the filters (which have tests of their own)."""
    kept = distribution(jnp.asarray(logits)[None], make_rows(1, **fields), jnp.zeros(1, jnp.int32), SamplerForm.FULL)
    weights = np.exp(np.asarray(kept[0], np.float64))
    return weights / weights.sum()


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[probabilities == 0].sum() == 0, "a token that the filters forbid"
    wanted = probabilities[probabilities > 0] * len(tokens)
    return float(((counts[probabilities > 0] - wanted) ** 2 / wanted).sum())


compiled_sample = jax.jit(sample, static_argnums=3)
compiled_accept = jax.jit(accept, static_argnums=4)


@partial(jax.jit, static_argnames=("form", "known", "rule"))
def speculate(logits, wrong, rows: SamplingRows, *, form: SamplerForm, known: bool, rule: str = "") -> acceptance.Kept:
    """All rows after the same context: proposals from `wrong` f32[X, V], the target's logits f32[X + 1, V].

    rule: told apart by the compile cache where a test breaks it.
    """
    num_drafted, positions = wrong.shape[0], jnp.full(DRAWS, 3, jnp.int32)
    wrong, every = (jnp.broadcast_to(values, (DRAWS, *values.shape)) for values in (wrong, logits))
    proposals = [sample(wrong[:, i], draft_rows(rows), positions + i, form) for i in range(num_drafted)]
    drafted = Drafted(jnp.stack(proposals, axis=1), jnp.full(DRAWS, num_drafted), wrong if known else None)
    return accept(every, drafted, rows, positions, form)


def draw(logits: np.ndarray, error: float, num_drafted: int, form: SamplerForm = SamplerForm.SIMPLE, *,
         known: bool = True, rule: str = "", **fields) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Tokens i32[DRAWS, X + 1] and counts of rows that differ in their seed alone."""
    wrong = off_by(logits[:num_drafted], error)
    kept = speculate(logits, wrong, make_rows(DRAWS, **fields), form=form, known=known, rule=rule)
    return np.asarray(kept.tokens), np.asarray(kept.count)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_tokens_follow_the_target(drafter, sampler, seeded):
    logits = target_logits(3)
    fields = SAMPLERS[sampler] | {"seeded": seeded}
    tokens, counts = draw(logits, DRAFTERS[drafter], 2, **fields)
    for position in range(3):
        # Positions do not depend on each other here, so those that were reached are a fair sample.
        reached = tokens[counts > position, position]
        if len(reached) > 1000:
            assert chi_square(reached, expected(logits[position], **fields)) < LIMIT, position
    assert ((tokens >= 0).sum(axis=1) == counts).all()


@pytest.mark.parametrize("known", [True, False])
def test_a_drafter_that_knows_nothing_of_a_grammar_changes_nothing(known):
    """The target may not say some tokens, the drafter proposes them all the same."""
    drafted = off_by(target_logits(1), 0.7)
    logits = target_logits(2)
    logits[:, [1, 4, 7]] = -np.inf
    kept = speculate(logits, drafted, make_rows(DRAWS), form=SamplerForm.SIMPLE, known=known)
    tokens, counts = np.asarray(kept.tokens), np.asarray(kept.count)
    assert chi_square(tokens[:, 0], expected(logits[0])) < LIMIT
    assert chi_square(tokens[counts == 2, 1], expected(logits[1])) < LIMIT


@pytest.mark.parametrize("error", DRAFTERS.values())
def test_given_tokens_follow_the_target(error):
    """Without the drafter's distribution: what it proposes is kept with the target's own probability of it."""
    logits = target_logits(2)
    tokens, counts = draw(logits, error, 1, known=False)
    assert chi_square(tokens[:, 0], expected(logits[0])) < LIMIT
    assert chi_square(tokens[counts == 2, 1], expected(logits[1])) < LIMIT


@pytest.mark.parametrize("proposed", [3, VOCAB, -7])
@pytest.mark.parametrize("lies", [False, True])
def test_a_lying_drafter_changes_nothing(proposed, lies):
    """It always proposes one token, or none of the vocabulary, and claims that it comes from another distribution."""
    logits = target_logits(2)
    rows = make_rows(DRAWS)
    claimed = jnp.full((DRAWS, 1, VOCAB), -30.0).at[:, :, 5].set(0.0) if lies else None
    drafted = Drafted(jnp.full((DRAWS, 1), proposed, jnp.int32), jnp.ones(DRAWS, jnp.int32), claimed)
    every = jnp.broadcast_to(jnp.asarray(logits), (DRAWS, 2, VOCAB))
    kept = compiled_accept(every, drafted, rows, jnp.full(DRAWS, 3, jnp.int32), SamplerForm.SIMPLE)
    tokens = np.asarray(kept.tokens)
    assert ((tokens >= -1) & (tokens < VOCAB)).all()
    if not lies:  # a wrong distribution biases what is trusted: only a drafter of the engine's own is
        assert chi_square(tokens[:, 0], expected(logits[0])) < LIMIT


@pytest.mark.parametrize("broken", ["accepts always", "recovers from the target", "one stream for all"])
def test_broken_rules_fail_this_test(broken, monkeypatch):
    if broken == "accepts always":
        monkeypatch.setattr(acceptance, "passes", lambda targets, drafted, *_: jnp.ones(drafted.tokens.shape, bool))
    elif broken == "recovers from the target":
        monkeypatch.setattr(acceptance, "recover", lambda targets, drafted, rows, at, positions, form: sample(
            targets[jnp.arange(len(at)), at], rows, positions, form))
    else:
        monkeypatch.setattr(acceptance, "keys_for", lambda use, keys: keys)
    logits = target_logits(2)
    tokens, _ = draw(logits, 1.5, 1, rule=broken)
    assert chi_square(tokens[:, 0], expected(logits[0])) > 10 * LIMIT


@pytest.mark.parametrize("form", SamplerForm)
@pytest.mark.parametrize("error", DRAFTERS.values())
def test_with_a_seed_the_output_is_that_without_speculation(form, error):
    logits, fields = target_logits(4), {"seeded": True, "temperature": 0.0 if form is SamplerForm.GREEDY else 0.9}
    tokens, counts = draw(logits, error, 3, form, **fields)
    rows = make_rows(DRAWS, **fields)
    for position in range(4):
        same_context = jnp.broadcast_to(logits[position], (DRAWS, VOCAB))
        plain = np.asarray(compiled_sample(same_context, rows, jnp.full(DRAWS, 3 + position, jnp.int32), form))
        reached = counts > position
        np.testing.assert_array_equal(tokens[reached, position], plain[reached])


@pytest.mark.parametrize("seeded", [False, True])
def test_a_perfect_drafter_is_always_right(seeded):
    _, counts = draw(target_logits(4), 0.0, 3, seeded=seeded)
    assert (counts == 4).mean() > 0.9999  # rejection compares with a uniform number below 1, up to rounding of p / q


def test_rejection_keeps_as_much_as_can_be_kept():
    """A proposal is kept with probability sum(min(p, q)): no rule keeps more (Leviathan et al., theorem 3.5)."""
    logits = target_logits(2)
    p, q = expected(logits[0]), expected(off_by(logits[:1], 0.7)[0])
    _, without_seed = draw(logits, 0.7, 1)
    _, by_noise = draw(logits, 0.7, 1, seeded=True)
    most = np.minimum(p, q).sum()
    assert abs((without_seed == 2).mean() - most) < 5 * np.sqrt(most * (1 - most) / DRAWS)
    assert (by_noise == 2).mean() < most


@pytest.mark.parametrize("form", SamplerForm)
def test_rows_keep_no_more_than_they_drafted(form):
    """Counts differ from row to row; behind them lies anything."""
    rng = np.random.default_rng(0)
    rows = make_rows(40, seeded=True, temperature=0.7)
    count = jnp.asarray(rng.integers(0, 4, 40), jnp.int32)
    logits = jnp.asarray(rng.normal(size=(40, 4, VOCAB)), jnp.float32)
    positions = jnp.zeros(40, jnp.int32)
    own = [compiled_sample(logits[:, i], rows, positions + i, form) for i in range(3)]
    drafted = Drafted(jnp.stack(own, axis=1), count, logits[:, :3])
    kept = compiled_accept(logits, drafted, rows, positions, form)
    np.testing.assert_array_equal(kept.count, count + 1)


def test_stop_ids_are_banned_at_each_position_of_its_own():
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, 2] = 30.0
    rows = make_rows(1, temperature=0.0, min_position=5, stop_ids=(2,))
    drafted = Drafted(jnp.array([[0, 0, 2]]), jnp.array([3]), None)
    kept = accept(jnp.asarray(logits)[None], drafted, rows, jnp.array([3], jnp.int32), SamplerForm.FULL)
    assert kept.tokens.tolist() == [[0, 0, 2, 2]]  # positions 3 and 4 may not stop, 5 and 6 may


# What a drafter elsewhere says that it sampled from: few candidates, whatever they are.

FEW = 4


def few(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids i32[X, FEW] and probabilities f32[X, FEW] of the likeliest of f32[X, V]."""
    ids = np.argsort(-logits, axis=1)[:, :FEW]
    weights = np.exp(np.take_along_axis(logits, ids, axis=1).astype(np.float64))
    return ids.astype(np.int32), (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


SAMPLED_FROM: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "good": lambda logits: few(off_by(logits, 0.7)),
    "bad": lambda logits: few(off_by(logits, 4.0)),
    "the target's least likely": lambda logits: few(-3.0 * logits),
    "one": lambda logits: (few(logits)[0], np.eye(FEW, dtype=np.float32)[[1, 2, 0]]),
}


def drawn(ids: np.ndarray, chances: np.ndarray, seed: int = 3) -> tuple[np.ndarray, Candidates]:
    """Tokens i32[DRAWS, X], each sampled from its candidates [X, FEW], and these for every row."""
    noise = np.random.default_rng(seed).random((DRAWS, len(ids), 1))
    bounds = np.cumsum(chances, axis=1, dtype=np.float64)
    picked = np.minimum((noise >= bounds).sum(axis=2), FEW - 1)
    every = Candidates(*(np.broadcast_to(field, (DRAWS, *field.shape)).copy() for field in (ids, chances)))
    return ids[np.arange(len(ids)), picked], every


@partial(jax.jit, static_argnames="rule")
def trust(logits, tokens, candidates: Candidates, rows: SamplingRows, rule: str) -> acceptance.Kept:
    """The last of the tokens i32[DRAWS, X + 1] is beyond the proposals."""
    num_rows, num_drafted = tokens.shape[0], tokens.shape[1] - 1
    drafted = Drafted(tokens[:, :-1], jnp.full(num_rows, num_drafted), None, candidates, tokens[:, -1])
    every = jnp.broadcast_to(logits, (num_rows, *logits.shape))
    return accept(every, drafted, rows, jnp.full(num_rows, 3, jnp.int32), SamplerForm.SIMPLE)


def check_trusted(logits: np.ndarray, kept: acceptance.Kept, **fields) -> None:
    tokens, counts = np.asarray(kept.tokens), np.asarray(kept.count)
    for position in range(len(logits)):
        reached = tokens[counts > position, position]
        if len(reached) > 1000:
            assert chi_square(reached, expected(logits[position], **fields)) < LIMIT, position


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("drafter", SAMPLED_FROM)
def test_what_a_truthful_drafter_sampled_follows_the_target(drafter, sampler):
    """And as much is kept as any rule can keep, whatever filters the target has."""
    logits, fields = target_logits(3), SAMPLERS[sampler]
    ids, chances = SAMPLED_FROM[drafter](logits)
    tokens, candidates = drawn(ids, chances)
    kept = trust(logits, tokens, candidates, make_rows(DRAWS, **fields), "")
    check_trusted(logits, kept, **fields)
    whole = np.asarray(kept.count) == 3
    for position, same in ((0, np.asarray(kept.count) > 1), (2, np.asarray(kept.tokens)[whole, 2] == tokens[whole, 2])):
        if len(same) > 1000:
            most = np.minimum(expected(logits[position], **fields)[ids[position]], chances[position]).sum()
            assert same.mean() > most - 5 * np.sqrt(most * (1 - most) / len(same)) - 1e-6, position
            assert same.mean() < most + 5 * np.sqrt(most * (1 - most) / len(same)) + 1e-6, position


def test_given_tokens_may_be_among_sampled_ones():
    """In every second row, and at every second place, a token that the drafter chose by what it likes."""
    logits = target_logits(3)
    tokens, candidates = drawn(*SAMPLED_FROM["good"](logits))
    given = np.zeros(tokens.shape, bool)
    given[::2, 0] = given[::3, 1] = given[::5, 2] = True
    tokens = np.where(given, np.array([[8, 2, 4]]), tokens)
    ids = np.where(given[..., None], np.stack([tokens, *[np.zeros_like(tokens)] * (FEW - 1)], axis=2), candidates.ids)
    chances = np.where(given[..., None], np.eye(FEW, dtype=np.float32)[0], candidates.chances)
    kept = trust(logits, tokens, Candidates(ids, chances), make_rows(DRAWS), "")
    for some in (slice(0, None, 2), slice(1, None, 2)):
        check_trusted(logits, acceptance.Kept(kept.tokens[some], kept.count[some]))


@pytest.mark.parametrize("lies", [True, False])
def test_lies_and_a_broken_rule_fail_the_test_of_trust(lies, monkeypatch):
    """Probabilities of other candidates; sampled tokens that are taken as given ones."""
    logits = target_logits(3 if lies else 2)
    tokens, candidates = drawn(*(field[:len(logits)] for field in SAMPLED_FROM["good"](target_logits(3))))
    if lies:
        candidates = Candidates(candidates.ids, candidates.chances[..., ::-1])
    else:
        monkeypatch.setattr(acceptance, "proposed_chance", lambda *_: None)
    kept = trust(logits, tokens, candidates, make_rows(DRAWS), "" if lies else "given")
    assert chi_square(np.asarray(kept.tokens)[:, 0], expected(logits[0])) > 10 * LIMIT


@pytest.mark.parametrize("fields", [{"seeded": True, "temperature": 0.9}, {"temperature": 0.0}])
def test_with_a_seed_what_was_sampled_changes_nothing(fields):
    logits, rows = target_logits(3), make_rows(DRAWS, **fields)
    tokens, candidates = drawn(*SAMPLED_FROM["good"](logits))
    kept = trust(logits, tokens, candidates, rows, "")
    for position in range(3):
        same_context = jnp.broadcast_to(logits[position], (DRAWS, VOCAB))
        plain = compiled_sample(same_context, rows, jnp.full(DRAWS, 3 + position, jnp.int32), SamplerForm.SIMPLE)
        reached = np.asarray(kept.count) > position
        np.testing.assert_array_equal(np.asarray(kept.tokens)[reached, position], np.asarray(plain)[reached])
