"""Services for the tests of this folder."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from counting_engine import CountingEngine, make_core
from serving import Served, serving

if TYPE_CHECKING:
    from vllm_peer import Peer


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


@pytest.fixture
def peer(served: Served) -> "Iterator[Peer]":
    """A client as gateways are."""
    from vllm_peer import connected  # only where its stubs are installed

    with connected(served.server.address) as found:
        yield found


@pytest.fixture
def slow(stepped: Served) -> "Iterator[Peer]":
    """The same of the service that steps only when the test says so."""
    from vllm_peer import connected

    with connected(stepped.server.address) as found:
        yield found
