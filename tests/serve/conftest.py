"""Services for the tests of this folder."""

from collections.abc import Iterator

import pytest
from counting_engine import CountingEngine, make_core
from serving import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A service whose engine steps by itself every millisecond."""
    with serving(make_core(CountingEngine(tokens_per_step=2, pace=0.001))) as found:
        yield found


@pytest.fixture
def stepped() -> Iterator[Served]:
    """A service whose engine steps only when the test says so."""
    with serving(make_core(CountingEngine())) as found:
        yield found
