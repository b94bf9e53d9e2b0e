"""The second feature table of jaxinfer/README.md: what an engine may have, against each other.

What an engine said is scored by the same engine: each token must be the one that the reference takes of these logits.
And its logits are those of a plain engine, as near as its numbers can come.
"""

from functools import cache

import numpy as np
import pytest
from engine_runs import EVERYWHERE, STARTS, Answers, Folders, answers_of, legal, options_of, text_of
from features import (
    ENGINES,
    EXCLUDED,
    REFUSED,
    WORKS,
    engine_cells_of,
    read_readme,
    wanted_engine_pairs,
)
from reference_sampler import candidates, noise

from jaxinfer.errors import InvalidConfig
from jaxinfer.start_options import Options
from jaxinfer.types import Request, StepPlan

CELLS = engine_cells_of(read_readme())
CLOSE = 1e-2
"""By how much logits of one token may differ where they were computed in other batches, activations in int8."""
ROUNDED = 0.15
"""Mean error of logits with numbers of 8 bits, over their standard deviation; a wrong page gives 1."""
DRAFTERS = ("draft model", "prompt lookup", "Medusa", "remote drafter")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders.written(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def answered(folders):
    """By what an engine has, each started once."""
    return cache(lambda features: answers_of(folders, features))


@pytest.fixture(scope="module")
def plain(folders):
    """An engine with none of them; its programs compute logits of any text."""
    with folders.started() as llm:
        yield llm


def test_every_cell_has_its_test():
    assert [(cell.row, cell.column) for cell in CELLS] == list(wanted_engine_pairs())
    assert {cell.says for cell in CELLS} == {WORKS, REFUSED, EXCLUDED}


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.says == REFUSED], ids=str)
def test_a_pair_that_is_refused_names_both_fields(cell):
    with pytest.raises(InvalidConfig) as caught:
        Options(model="demo", **options_of(cell.row, cell.column)).validate()
    for name in (cell.row, cell.column):
        assert any(field in str(caught.value) for field in ENGINES[name])


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.says == EXCLUDED], ids=str)
def test_a_pair_that_excludes_itself_sets_one_field_twice(cell):
    row, column = ENGINES[cell.row], ENGINES[cell.column]
    assert any(row[name] != column[name] for name in row.keys() & column.keys())


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.says == WORKS], ids=str)
def test_two_features_of_an_engine(cell, answered, plain):
    starts = [features for features in STARTS if {cell.row, cell.column} <= {*features, *EVERYWHERE}]
    assert starts
    for features in starts:
        found = answered(features)
        for name in (cell.row, cell.column):
            assert is_seen(name, found), f"nothing shows {name} in {features}"
        for one in found.requests:
            check_tokens(one, found)
            check_logits(found.logits[one.id], plain.logits(text_of(one, found.found)))


def is_seen(name: str, answers: Answers) -> bool:
    """Whether the run shows that the engine has it; numbers are those of `check_logits`."""
    engine, outputs = answers.found.engine, answers.found.outputs.values()
    metrics = engine.scheduler.metrics
    shown = {
        "prefix cache": any(output.num_cached_tokens > 0 for output in outputs),
        "preemption": metrics.preemptions > 0,
        "chunked prefill": sum(map(is_inner_chunk, answers.found.plans)) > 3,
        "constrained output": any(plan.constrained for plan in answers.found.plans),
        "tensor parallel": answers.num_devices == 2,
    }
    return metrics.draft_tokens > metrics.accepted_tokens > 0 if name in DRAFTERS else shown.get(name, True)


def is_inner_chunk(plan: StepPlan) -> bool:
    return any(not samples for samples in plan.samples)


def check_tokens(one: Request, answers: Answers) -> None:
    said = list(answers.found.outputs[one.id].outputs[0].token_ids)
    raw = answers.logits[one.id][len(one.prompt) - 1:]
    assert len(said) == one.max_tokens
    for count, token in enumerate(said):
        values = candidates(raw[count], one, said[:count], legal if one.grammar else None)
        if one.params.temperature > 0:
            values = values + noise(one.seed, 0, len(one.prompt) + count, len(values))
        assert values[token] > values.max() - CLOSE, f"token {count}, {token}"


def check_logits(found: np.ndarray, exact: np.ndarray) -> None:
    """All engines here have numbers of 8 bits: it shows, and it is not much."""
    assert 0.001 < np.abs(found - exact).mean() / exact.std() < ROUNDED
