"""A million events on the scheduler, of the kinds and with the checks of tests/jaxinfer/test_scheduler_random.py."""

from collections.abc import Callable

from figures import Figures
from test_scheduler_random import CONFIGS, Driver
from tqdm import tqdm

DEPTHS = (0, 1, 2)
SHORT, FULL = 4_800, 1_000_000
PER_DRIVER = 10_000
"""Events; then another one begins with another seed, since a harness keeps all answers until it compares them."""


def test_random_events(count: Callable[[int, int], int], is_full: bool, figures: Figures):
    """The books agree after every event, and every request ends with its own tokens."""
    each = -(-count(SHORT, FULL) // (len(CONFIGS) * len(DEPTHS)))
    cases = [(name, depth) for name in CONFIGS for depth in DEPTHS]
    events = preemptions = requests = 0
    for name, depth in tqdm(cases, desc="scheduler", unit="case", disable=not is_full):
        for number, begin in enumerate(range(0, each, PER_DRIVER)):
            driver = Driver(CONFIGS[name], depth, seed=1000 + number)
            share = min(PER_DRIVER, each - begin)
            driver.run(share)
            driver.harness.check_outputs()
            assert driver.harness.pool.num_held == 0
            events += share
            requests += len(driver.harness.ends)
            preemptions += driver.harness.scheduler.metrics.preemptions
    figures(events=events, samples=requests, preemptions=preemptions)
    assert events >= count(SHORT, FULL) and preemptions
