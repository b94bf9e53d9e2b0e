"""The feature table of jaxinfer/README.md: every cell is a test, and every test has its cell.

Pairs of request features run through an engine without a drafter, with a draft model and with prompt lookup, all in one
batch. A pair's request is one in which both features change what is said, or else it would show nothing.
Requests without a seed draw other tokens with a drafter: checked is that each can be drawn and that the end is right;
that their distribution is the target's is for test_acceptance.py.
"""

from dataclasses import replace
from functools import cache
from itertools import chain, count

import numpy as np
import pytest
from counting import request
from feature_runs import (
    DRAFTERS,
    MORE_DRAFTERS,
    Run,
    check,
    letter_tokenizer,
    new_executor,
    new_intake,
    request_of,
    run,
    wanted,
)
from features import (
    EXCLUDED,
    KEEP_TOKENS,
    MODES,
    NOTHING,
    REFUSED,
    REQUEST,
    WORKS,
    Cell,
    cells_of,
    read_readme,
    wanted_pairs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_sampler import VOCAB

from jaxinfer.errors import InvalidRequest
from jaxinfer.types import Request, TokenRules

CELLS = cells_of(read_readme())
PAIRS = [cell for cell in CELLS if cell.row in REQUEST]
RUNNING = [cell for cell in PAIRS if cell.says in (WORKS, NOTHING)]
TRIES, FEW = 24, 6
"""Prompts and seeds among which telling ones are looked for."""


@pytest.fixture(scope="module")
def intake():
    found = new_intake()
    yield found
    found.close()


@pytest.fixture(scope="module")
def executor():
    """By drafter, each compiled once."""
    return cache(new_executor)


@pytest.fixture(scope="module")
def pairs(intake) -> dict[Cell, list[Request]]:
    """The requests of each pair that runs."""
    return {cell: telling(intake, cell) for cell in RUNNING}


@pytest.fixture(scope="module")
def answered(executor, intake, pairs):
    """What each engine answered to each feature alone, and to all pairs."""
    @cache
    def run_all(drafter: str) -> Run:
        every = [request_of(intake, (name,), seed) for seed, name in enumerate(REQUEST)]
        if drafter in DRAFTERS:
            every += chain.from_iterable(pairs.values())
        # Rows with a grammar make the steps of all others smaller, so they come after them.
        return run(executor(drafter), letter_tokenizer(), [[one for one in every if one.grammar is None],
                                                           [one for one in every if one.grammar is not None]])

    return run_all


def telling(intake, cell: Cell) -> list[Request]:
    """Requests with both features: one that would have another answer without either. Where one ends the output before
    the other can, some for each.
    """
    pair, shown, found = (cell.row, cell.column), set(), []
    tried = [(one, changed_by(intake, pair, seed, one)) for seed, one in enumerate(
        request_of(intake, pair, seed) for seed in range(TRIES if cell.says == WORKS else FEW))]  # fmt: skip
    if cell.says == NOTHING:
        assert all(len(changed) < len(changing(pair)) for _, changed in tried), f"{cell}: both change the answer"
        return [one for one, _ in tried]
    for one, changed in sorted(tried, key=lambda each: -len(each[1])):
        if changed - shown or not found:
            found.append(one)
            shown |= changed
    assert shown == changing(pair), f"{cell}: nothing shows {changing(pair) - shown}"
    return found


def changed_by(intake, pair: tuple[str, ...], seed: int, one: Request) -> set[str]:
    """Those of the two features without which the answer is another."""
    return {name for name in changing(pair) if wanted(one) != wanted(without(intake, pair, name, seed))}


def without(intake, pair: tuple[str, ...], name: str, seed: int) -> Request:
    return request_of(intake, tuple(one for one in pair if one != name), seed)


def changing(pair: tuple[str, ...]) -> set[str]:
    return set(pair) - KEEP_TOKENS - set(MODES)


def is_exact(request: Request, drafter: str) -> bool:
    return drafter == "none" or request.params.seed is not None or request.params.temperature == 0


def test_every_cell_has_its_test():
    assert [(cell.row, cell.column) for cell in CELLS] == list(wanted_pairs())
    assert {cell.says for cell in CELLS} <= {WORKS, NOTHING, REFUSED, EXCLUDED}


@pytest.mark.parametrize("change", [
    lambda text: text.replace("| 5 | top_p | ", "| 5 | top_pp | "),
    lambda text: text.replace("| | preemption | + ", "| | preemption | "),
    lambda text: text.replace("| | chunked prefill ", "| | chunked "),
    lambda text: text.replace("| 3 | unseeded sampling | / | / ", "| 3 | unseeded sampling | / | "),
])  # fmt: skip
def test_a_cell_that_is_missing_or_unknown_is_found(change, repository):
    text = (repository / "jaxinfer/README.md").read_text()
    assert change(text) != text
    try:
        found = [(cell.row, cell.column) for cell in cells_of(change(text))]
    except ValueError:
        return
    assert found != list(wanted_pairs())


@pytest.mark.parametrize("cell", RUNNING, ids=str)
def test_two_features_of_a_request(cell, pairs, answered):
    for drafter in DRAFTERS:
        for one in pairs[cell]:
            check(one, answered(drafter).outputs[one.id], exact=is_exact(one, drafter))


@pytest.mark.parametrize("cell", [cell for cell in PAIRS if cell.says == REFUSED], ids=str)
def test_a_pair_that_is_refused_names_both_fields(cell, intake):
    with pytest.raises(InvalidRequest) as caught:
        request_of(intake, (cell.row, cell.column), 0)
    names = {cell.row.removesuffix("=False"), cell.column.removesuffix("=False")}
    assert caught.value.field in names
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("cell", [cell for cell in PAIRS if cell.says == EXCLUDED], ids=str)
def test_a_pair_that_excludes_itself_sets_one_field_twice(cell):
    row, column = REQUEST[cell.row], REQUEST[cell.column]
    assert any(row[name] != column[name] for name in row.keys() & column.keys())


# ---- features of the engine


@pytest.mark.parametrize("name", REQUEST)
@pytest.mark.parametrize("drafter", DRAFTERS[1:] + MORE_DRAFTERS)
def test_with_a_drafter(drafter, name, intake, answered):
    found = answered(drafter)
    one = request_of(intake, (name,), list(REQUEST).index(name))
    check(one, found.outputs[one.id], exact=is_exact(one, drafter))


@pytest.mark.parametrize("drafter", DRAFTERS[1:] + MORE_DRAFTERS)
def test_drafters_were_asked_and_kept(drafter, answered):
    metrics = answered(drafter).engine.scheduler.metrics
    assert metrics.draft_tokens > metrics.accepted_tokens > (100 if drafter in DRAFTERS else 20)


@pytest.mark.parametrize("name", REQUEST)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_behind_a_chunked_prompt(drafter, name, intake, executor):
    one = request_of(intake, (name,), 7, length=50)
    found = run(executor(drafter), letter_tokenizer(), [[one]])
    assert [len(plan.tokens[0]) for plan in found.plans if plan.tokens[0]][:2] == [32, 18]
    check(one, found.outputs[one.id], exact=is_exact(one, drafter))


@pytest.mark.parametrize("name", REQUEST)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_behind_a_cached_prefix(drafter, name, intake, executor):
    first, one = request_of(intake, (), 7, length=31), request_of(intake, (name,), 7, length=31)
    found = run(executor(drafter), letter_tokenizer(), [[first], [one]])
    (cell,) = [cell for cell in CELLS if (cell.row, cell.column) == ("prefix cache", name)]
    assert found.outputs[one.id].num_cached_tokens == (28 if cell.says == WORKS else 0)
    check(one, found.outputs[one.id], exact=is_exact(one, drafter))


def says_much(one: Request) -> bool:
    return min(len(wanted(one, index)) for index in range(one.params.n)) > 20


@pytest.mark.parametrize("name", REQUEST)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_through_preemptions(drafter, name, intake, executor):
    """Others, which run first, need the pages of a row that has said some tokens."""
    others = [request_of(intake, ("ignore_eos",), seed, length=20, max_tokens=40) for seed in range(3)]
    many = (request_of(intake, (name,), seed, length=7, max_tokens=40) for seed in count())
    one = next(filter(says_much, many))
    found = run(executor(drafter), letter_tokenizer(), [[*others, one]], num_pages=34)
    assert max(stats.num_preemptions for stats in found.stats[one.id]) > 0
    for each in (*others, one):
        check(each, found.outputs[each.id], exact=is_exact(each, drafter))


# ---- requests at random


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
            min_tokens=draw(st.integers(0, max_tokens)), n=draw(st.sampled_from([1, 1, 2])), ignore_eos=True,
            logprobs=draw(st.sampled_from([None, None, 2])))
        rules = draw(st.one_of(st.none(), ruled))
        if rules is not None and leaves_a_token(rules, stop_ids):
            one = replace(one, rules=rules)
        found.append(one)
    return found


def leaves_a_token(rules: TokenRules, stop_ids: tuple[int, ...]) -> bool:
    never = {id_ for id_, value in rules.bias if value == -np.inf} | {word[-1] for word in rules.bad_words}
    return bool(set(range(VOCAB) if rules.allowed is None else rules.allowed) - never - set(stop_ids))


@pytest.mark.parametrize("drafter", DRAFTERS)
@settings(max_examples=40)
@given(mix=requests())
def test_every_answer_follows_its_own_rules(drafter, executor, mix):
    """The same tokens with a drafter as without, since every row is greedy or has a seed. Few pages: some rows are
    preempted and their rules entered again.
    """
    found = run(executor(drafter), None, [mix], num_pages=30)
    for one in mix:
        for sample in found.outputs[one.id].outputs:
            assert sample.token_ids == wanted(one, sample.index)


def test_a_slot_forgets_the_rules_of_the_row_before(executor):
    batches = []
    for number in range(6):
        rules = TokenRules(allowed=(number,)) if number % 2 else None
        one = request(str(number), range(8), 6, temperature=0.0, arrival=float(number))
        batches.append([replace(one, rules=rules)])
    found = run(executor("none"), None, batches)
    for (one,) in batches:
        assert found.outputs[one.id].outputs[0].token_ids == wanted(one)
