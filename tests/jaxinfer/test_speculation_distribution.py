"""Requests without a seed through a whole engine: what they say follows the target's distribution, known exactly.

`test_acceptance` holds the rule to it on proposals of its own; here they come from a drafter, whose distribution must
be the one that it has really drawn from, behind the same temperature and token rules.
"""

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from feature_runs import letter_tokenizer, new_executor, new_intake, request_of, run
from reference_sampler import VOCAB, by_table, candidates

from jaxinfer import draft_model, medusa_drafter
from jaxinfer.executor import Executor
from jaxinfer.noise import first_largest

REQUESTS, TOKENS = 250, 24
LEAST_VARIANCE = 3.0
"""Of a cell's count: with less it is no normal distribution."""
MOST = 1.5
"""Of the mean of squared deviations: 1 is expected, give or take 0.1 for 200 cells, 0.25 for 32."""

KINDS = {
    "SIMPLE": ("unseeded sampling", "ignore_eos"),
    "SIMPLE, top-k and top-p": ("unseeded sampling", "top_k", "top_p", "ignore_eos"),
    "FULL, penalties": ("unseeded sampling", "frequency_penalty", "repetition_penalty", "ignore_eos"),
    "FULL, bias and bad words": ("unseeded sampling", "logit_bias", "bad_words", "ignore_eos"),
}


def deviation(executor: Executor, kind: str) -> float:
    """Mean square of the deviations of tokens' counts behind each token, in standard deviations."""
    intake = new_intake()
    requests = [request_of(intake, KINDS[kind], index, max_tokens=TOKENS) for index in range(REQUESTS)]
    found = run(executor, letter_tokenizer(), [requests])
    seen, expected, variance = np.zeros((3, VOCAB, VOCAB))
    for one in requests:
        said = list(found.outputs[one.id].outputs[0].token_ids)
        for index, token in enumerate(said):
            context = [*one.prompt, *said[:index]]
            logits = candidates(by_table(context), one, said[:index], None).astype(float)
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            seen[context[-1], token] += 1
            expected[context[-1]] += chances
            variance[context[-1]] += chances * (1 - chances)
    metrics = found.engine.scheduler.metrics
    assert 0 < metrics.accepted_tokens < metrics.draft_tokens, "proposals are kept, and refused"
    counted = variance > LEAST_VARIANCE
    assert counted.sum() >= 32
    return float(np.mean((seen - expected)[counted] ** 2 / variance[counted]))


@pytest.fixture(scope="module", params=["draft model", "Medusa"])
def executor(request: pytest.FixtureRequest) -> Executor:
    return new_executor(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_follows_the_target(executor: Executor, kind: str):
    assert 1 / MOST < deviation(executor, kind) < MOST


def likeliest(draw: Callable) -> Callable:
    """Draws the likeliest token, whatever distribution is handed on for it."""
    return lambda logits, *others: first_largest(logits)


@pytest.mark.parametrize(("drafter", "module"), [("draft model", draft_model), ("Medusa", medusa_drafter)])
def test_a_drafter_that_draws_from_another_distribution_is_found_out(drafter: str, module):
    with mock.patch.object(module, "sample", likeliest(module.sample)):
        assert deviation(new_executor(drafter), "SIMPLE") > MOST
