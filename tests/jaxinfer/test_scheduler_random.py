"""The scheduler under random arrivals, cancels and failures, its books checked after every event.

The seeded cases run 100,800 events together, and hypothesis chooses about as many.
"""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_device import VOCAB, Harness, make_config

from jaxinfer.draft_lengths import CatchUp, DraftLengths
from jaxinfer.round_clock import RoundSeconds
from jaxinfer.types import SamplerForm

EVENTS, SPECULATING_EVENTS = 4_200, 1_200

CONFIGS = {
    "roomy": {},
    "rounds": {"max_decode_rounds": 6},
    "tiny pool": {"num_pages": 12, "max_decode_rounds": 3},
    "one row": {"num_pages": 12, "max_num_seqs": 1, "max_num_batched_tokens": 5},
    "smallest budget": {"num_pages": 14, "max_num_batched_tokens": 4, "max_decode_rounds": 4},
    "many rows": {"num_pages": 16, "max_num_seqs": 12, "max_num_batched_tokens": 24},
    "no prefix cache": {"num_pages": 14, "enable_prefix_caching": False, "max_decode_rounds": 2},
    "page of one": {"page_size": 1, "num_pages": 70, "max_decode_rounds": 5},
}
SHORT_OF_PAGES = {"tiny pool", "smallest budget", "many rows", "no prefix cache", "page of one"}


class Driver:
    """Random events on a harness."""

    def __init__(self, config: dict, depth: int, seed: int, drafts: DraftLengths | None = None, keeps: float = 0.0):
        self.random = random.Random(seed)
        self.harness = Harness(make_config(**config), depth, drafts=drafts, keeps=keeps)
        self.prefixes = [[self.random.randrange(VOCAB) for _ in range(30)] for _ in range(3)]

    def arrive(self) -> bool:
        pick = self.random
        length = pick.choice((1, 2, 4, 5, 8, 9, 16, 17, pick.randint(1, 30)))
        prompt = pick.choice(self.prefixes)[:length]
        if pick.random() < 0.5:
            prompt = prompt + [pick.randrange(VOCAB) for _ in range(pick.randint(1, 6))]
        self.harness.make(**random_fields(pick, prompt))
        return True

    def cancel(self) -> bool:
        live = sorted(self.harness.outputs.keys() - self.harness.ends.keys())
        if live:
            id, index = self.random.choice(live)
            self.harness.cancel(id, self.random.choice((None, index)))
        return bool(live)

    def event(self, rush: float) -> bool:
        """Something that may happen to a scheduler, an arrival with probability `rush`; False when it was nothing."""
        harness, dice = self.harness, self.random.random()
        if dice < rush and harness.scheduler.num_waiting < 20:
            return self.arrive()
        if dice > 0.99:
            return self.cancel()
        if dice > 0.988:
            return harness.fail()
        if len(harness.in_flight) <= harness.depth and (dice < 0.6 or not harness.in_flight) and harness.plan():
            return True
        return bool(harness.in_flight) and harness.commit() is not None

    def run(self, num_events: int) -> None:
        """Busy and calm times in turn, then whatever is left."""
        count = 0
        while count < num_events:
            count += self.event(rush=(0.02, 0.1, 0.3)[count // 100 % 3])
        self.harness.run()


def random_fields(pick: random.Random, prompt: list[int]) -> dict:
    """All that a request may ask for, the rarer fields rarely."""
    stop_ids = tuple(pick.sample(range(VOCAB), pick.choice((0, 0, 1, 6))))
    max_tokens = pick.choice((1, 2, 3, 48, pick.randint(1, 48 - len(prompt))))
    return {
        "prompt": prompt, "max_tokens": min(max_tokens, 48 - len(prompt)), "stop_ids": stop_ids,
        "priority": pick.choice((0, 0, 0, -1, 1)), "cache_salt": pick.choice(("", "", "other")),
        "n": pick.choice((1, 1, 1, 3)), "temperature": pick.choice((0.0, 1.0)),
        "min_tokens": pick.choice((0, 0, 1)), "logprobs": pick.choice((None, None, None, 0, 2)),
        "prompt_logprobs": pick.choice((None, None, None, 1)),
    }


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_request_ends_with_its_own_tokens(name: str, depth: int):
    driver = Driver(CONFIGS[name], depth, seed=depth)
    driver.run(EVENTS)
    driver.harness.check_outputs()
    assert driver.harness.pool.num_held == 0
    if name in SHORT_OF_PAGES:
        assert driver.harness.scheduler.metrics.preemptions > 10, "the pool was to be too small"


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_so_it_does_where_rounds_bring_several_tokens(name: str, depth: int):
    """The drafter is caught up with in chunks of 8 tokens; proposals pay for two rows, and a little for more."""
    few, many = RoundSeconds(1.0, 1.1, 1.3), RoundSeconds(1.0, 1.5, 2.2)
    drafts = DraftLengths(3, {form: {2: few, 64: many} for form in SamplerForm}, CatchUp(8, 0.5))
    config = CONFIGS[name] | {"num_speculative_tokens": 3}
    driver = Driver(config, depth, seed=depth, drafts=drafts, keeps=(0.9, 0.5, 0.1)[depth])
    driver.run(SPECULATING_EVENTS)
    driver.harness.check_outputs()
    assert driver.harness.pool.num_held == 0
    assert any(plan.num_drafted for plan in driver.harness.plans)


class SchedulerMachine(RuleBasedStateMachine):
    """The same events, chosen and shrunk by hypothesis."""

    @initialize(name=st.sampled_from(sorted(CONFIGS)), depth=st.integers(0, 2))
    def start(self, name: str, depth: int):
        self.harness = Harness(make_config(**CONFIGS[name]), depth, check=False)

    @rule(prefix=st.integers(0, 2), length=st.integers(1, 20), tail=st.lists(st.integers(0, VOCAB - 1), max_size=3),
          seed=st.integers(0, 2**16))
    def arrive(self, prefix: int, length: int, tail: list[int], seed: int):
        prompt = [(prefix * 7 + position * (prefix + 1)) % VOCAB for position in range(length)] + tail
        self.harness.make(**random_fields(random.Random(seed), prompt))

    @precondition(lambda self: len(self.harness.in_flight) <= self.harness.depth)
    @rule()
    def plan(self):
        self.harness.plan()

    @precondition(lambda self: self.harness.in_flight)
    @rule()
    def commit(self):
        self.harness.commit()

    @rule(number=st.integers(0, 10), index=st.sampled_from((None, 0, 1)))
    def cancel(self, number: int, index: int | None):
        self.harness.cancel(f"r{number:04}", index)

    @rule()
    def fail(self):
        self.harness.fail()

    @invariant()
    def books_agree(self):
        if hasattr(self, "harness"):
            self.harness.scheduler.check_invariants()

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.run()
            self.harness.check_outputs()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=1_000, stateful_step_count=100)
