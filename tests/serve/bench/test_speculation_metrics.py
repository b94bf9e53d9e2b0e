"""What speculation kept, out of the metrics that the server itself writes."""

import pytest

from serve.bench.speculation import Drafted, speculated
from serve.exposition import Family, text_of
from serve.metric_families import counters


def text(proposed: int, accepted: int, rounds: dict[int, int]) -> str:
    return text_of([
        Family.of("jaxinfer_draft_tokens_total", "counter", "x", proposed, {}),
        Family.of("jaxinfer_accepted_tokens_total", "counter", "x", accepted, {}),
        counters("draft_rounds_total", "x", "accepted", rounds),
    ])  # fmt: skip


def test_the_difference_of_two_scrapes():
    before = Drafted.read(text(100, 40, {0: 10, 1: 10, 2: 15}))
    after = Drafted.read(text(140, 56, {0: 12, 1: 14, 2: 19, 3: 0, 4: 1}))
    assert before == Drafted(100, 40, {0: 10, 1: 10, 2: 15})
    found = speculated(before, after)  # rounds: two kept none, four 1, four 2, one 4
    assert found["spec_decode_num_drafts"] == 11
    assert (found["spec_decode_draft_tokens"], found["spec_decode_accepted_tokens"]) == (40, 16)
    assert found["spec_decode_acceptance_rate"] == 40.0
    assert found["spec_decode_acceptance_length"] == pytest.approx(1 + 16 / 11)
    assert found["spec_decode_per_position_acceptance_rates"] == pytest.approx([9 / 11, 5 / 11, 1 / 11, 1 / 11])


def test_without_proposals_there_is_nothing_to_say():
    same = Drafted.read(text(100, 40, {0: 60, 1: 40}))
    assert speculated(same, same) == {}
    assert speculated(Drafted(), Drafted.read("jaxinfer_ready 1\n")) == {}


def test_rounds_that_kept_nothing():
    found = speculated(Drafted(), Drafted(8, 0, {0: 2}))
    assert (found["spec_decode_acceptance_rate"], found["spec_decode_acceptance_length"]) == (0, 1)
    assert found["spec_decode_per_position_acceptance_rates"] == []
