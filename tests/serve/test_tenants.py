"""Cached prefixes stay within the tenant of the token that they came with."""

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from paged_engine import PAGE_SIZE, paged_core
from serving import Served, serving

from jaxinfer.protos.v1 import draft_pb2 as pb
from jaxinfer.protos.v1 import draft_pb2_grpc as pb_grpc
from serve.client import Client
from serve.tenant import current_tenant

ALICE, ALICE_TOO, BOB = "alice-0123456789abcdef", "alice-fedcba9876543210", "bob-0123456789abcdef0"
AL = "al-0123456789abcdef01"
PROMPT = list(range(5 * PAGE_SIZE))
HIT = 4 * PAGE_SIZE  # the last token is always computed, and with it its page


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\nalice {ALICE_TOO}\nbob {BOB}\nal {AL}\n")
    with serving(paged_core(), connect={"token": ALICE}, token_file=str(path)) as found:
        yield found


def cached(served: Served, token: str, salt: str | None = None) -> int:
    """Tokens of the prompt that came from the prefix cache."""
    with Client(served.server.address, token=token) as client:
        usage = client.generate(PROMPT, max_tokens=1, cache_salt=salt).usage
    assert usage.cached_tokens is not None
    return usage.cached_tokens


def test_a_tenant_shares_with_itself_and_with_nobody_else(served: Served):
    assert cached(served, ALICE) == 0
    assert cached(served, BOB) == 0
    assert [cached(served, one) for one in (ALICE, ALICE_TOO, BOB)] == [HIT] * 3


def test_a_salt_narrows_and_never_widens(served: Served):
    assert cached(served, ALICE) == 0
    for salt in ("alice", "bob", "('alice', '')", "alice\0"):
        assert cached(served, BOB, salt) == 0, "no salt reaches another tenant's pages"
    assert cached(served, AL, "ice") == 0, "nor does a salt that completes another tenant's name"
    assert cached(served, ALICE, "private") == 0
    assert cached(served, ALICE_TOO, "private") == HIT
    assert cached(served, BOB, "private") == 0


def test_streams_and_drafts_are_kept_apart_too(served: Served):
    """Every service submits through the bridge, which knows the tenant without the service's help."""
    assert draft(served, BOB) and cached(served, ALICE) == 0
    with Client(served.server.address, token=BOB) as bob:
        stream = bob.stream([*PROMPT, 1], max_tokens=1)
        list(stream)
    assert stream.usage is not None and stream.usage.cached_tokens == len(PROMPT), "what Bob's own draft computed"


def draft(served: Served, token: str) -> list[int]:
    """Proposals behind the prompt."""
    done = threading.Event()

    def asked() -> Iterator[pb.DraftRequest]:
        yield pb.DraftRequest(sequence=1, position=0, token_ids=PROMPT, num_wanted=2)
        done.wait(10)

    with grpc.insecure_channel(served.server.address) as channel:
        calls = pb_grpc.DraftServiceStub(channel).Draft(
            asked(), metadata=(("authorization", f"Bearer {token}"),), timeout=10)
        try:
            return list(next(calls).token_ids)
        finally:
            done.set()
            calls.cancel()


def test_without_tokens_all_share():
    with serving(paged_core()) as served:
        answers = [served.client.generate(PROMPT, max_tokens=1).usage.cached_tokens for _ in range(2)]
    assert answers == [0, HIT]


def test_outside_of_a_call_there_is_no_tenant():
    assert current_tenant() == ""
