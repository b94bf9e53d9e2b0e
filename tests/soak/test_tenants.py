"""What a tenant can learn of another's prompts: by the count of cached tokens, and by the time to the first token."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from figures import Figures
from server_process import ServerProcess, demo_command, running

from serve.client import Client

TOKENS = {"alice": "alice-0123456789abcdef", "bob": "bob-0123456789abcdef"}
PROMPT_TOKENS = 129
"""Nine steps of prefill, or one where all but the last token is cached."""
IDS = range(256, 4000)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    with running(demo_command("--token-file", str(folder / "tokens")), folder) as server, ExitStack() as stack:
        yield {name: stack.enter_context(connected(server, token)) for name, token in TOKENS.items()}
        assert not server.lines("Traceback"), server.log.read_text(errors="replace")[-6000:]


def connected(server: ServerProcess, token: str) -> Client:
    return Client(server.address, token=token)


@dataclass
class Asked:
    """What the asking tenant sees of its requests: milliseconds to the first token, and cached tokens."""

    times: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)

    def ask(self, client: Client, prompt: list[int]) -> None:
        began = time.perf_counter()
        stream = client.stream(prompt, max_tokens=1, ignore_eos=True, temperature=0, timeout=60)
        arrivals = [time.perf_counter() for delta in stream if delta.token_ids]
        self.times.append((arrivals[0] - began) * 1000)
        assert stream.usage is not None and stream.usage.cached_tokens is not None
        self.cached.append(stream.usage.cached_tokens)


def separation(one: list[float], other: list[float]) -> float:
    """How well one threshold tells the two apart: the area under the ROC curve (Mann-Whitney U over the number of
    pairs), of the better direction. 0.5: not at all, 1: always.
    """
    wins = sum((a < b) + (a == b) / 2 for a in one for b in other) / (len(one) * len(other))
    return max(wins, 1 - wins)


def test_another_tenants_prompts(clients: dict[str, Client], is_full: bool, count: Callable[[int, int], int],
                                 figures: Figures):
    """In every trial Alice sends a prompt, then Bob sends the same or one that nobody has sent, then his own again."""
    rng, alice = random.Random(18), Asked()
    sent_by_alice, sent_by_nobody, sent_by_bob = Asked(), Asked(), Asked()
    trials = [True, False] * count(10, 500)
    rng.shuffle(trials)
    for is_same in trials:
        hers, new = (rng.choices(IDS, k=PROMPT_TOKENS) for _ in range(2))
        alice.ask(clients["alice"], hers)
        (sent_by_alice if is_same else sent_by_nobody).ask(clients["bob"], hers if is_same else new)
        sent_by_bob.ask(clients["bob"], hers if is_same else new)
    assert separation([1, 3], [2, 4]) == separation([2, 4], [1, 3]) == 0.75  # three of four pairs
    told = separation(sent_by_alice.times, sent_by_nobody.times)
    own = separation(sent_by_bob.times, sent_by_nobody.times)
    figures(trials=len(trials), cross_tenant_hits=sum(map(bool, sent_by_alice.cached)), auc_other=told, auc_own=own)
    assert not any(alice.cached + sent_by_alice.cached + sent_by_nobody.cached)
    assert set(sent_by_bob.cached) == {PROMPT_TOKENS - 1}
    if is_full:
        assert told <= 0.55
        assert own > 0.9, "a hit is not to be seen in these times, so they show nothing"
