"""The counting model with proposals from outside, and their sources: one that is right, a liar, one that fails."""

import random
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from counting import VOCAB, small_config

from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.engine import Engine
from jaxinfer.executor import Executor
from jaxinfer.page_pool import PagePool
from jaxinfer.remote_drafts import LIKELIEST, Proposal, ProposalSource, RemoteDrafts, Terms, num_ahead
from jaxinfer.remote_proposals import RemoteProposals
from jaxinfer.scheduler import Scheduler
from jaxinfer.testing import CountingModel

DRAFTED, AHEAD = 3, 20
KEPT = num_ahead(DRAFTED)
COUNTING = CountingModel(VOCAB)


def new_executor(model: CountingModel = COUNTING, num_candidates: int = 0) -> Executor:
    config = small_config(num_speculative_tokens=DRAFTED)
    pair = DraftPair(model, RemoteProposals(DRAFTED, KEPT, config.max_num_seqs, num_candidates=num_candidates))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    executor = Executor(pair, Pair(jax.device_put(jnp.float32(0), place), ()), config, place)
    executor.warm_up(workers=2, progress=lambda name: None)
    return executor


def engine_of(executor: Executor, source: ProposalSource, num_candidates: int = 0) -> Engine:
    executor.reset()
    config = executor.config
    return Engine(executor, Scheduler(config, PagePool(config.num_pages, config.page_size)),
                  remote=RemoteDrafts(source, VOCAB, KEPT, num_candidates))  # fmt: skip


class Counting:
    """Proposes what will come, at once. late: it answers what it was told so many times before."""

    is_alive = True

    def __init__(self, late: int = 0):
        self.rows: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.closed = False
        self._late = late
        self._lengths: dict[int, list[int]] = {}  # of each row, whenever it was told of
        self._answers: dict[int, Proposal] = {}

    def tell(self, name: int, position: int, tokens: Sequence[int], terms: Terms = LIKELIEST) -> None:
        assert name not in self.ended and tokens
        row = self.rows.setdefault(name, [])
        assert position == len(row)
        row += tokens
        lengths = self._lengths.setdefault(name, [])
        lengths.append(len(row))
        if len(lengths) > self._late:
            self._answers[name] = self.answer(name, row[:lengths[-1 - self._late]])

    def answer(self, name: int, row: list[int]) -> Proposal:
        return Proposal(name, len(row), tuple((row[-1] + 1 + offset) % VOCAB for offset in range(AHEAD)))

    def forget(self, name: int) -> None:
        del self.rows[name]
        self.ended.add(name)

    def take(self) -> list[Proposal]:
        answers, self._answers = self._answers, {}
        return list(answers.values())

    def wait(self, seconds: float) -> None:
        """Nothing comes later."""

    def close(self) -> None:
        self.closed = True


class Follower(Counting):
    """Proposes what follows each token by a table of ids."""

    def __init__(self, following: Sequence[int]):
        super().__init__()
        self._following = following

    def answer(self, name: int, row: list[int]) -> Proposal:
        tokens = [row[-1]]
        for _ in range(AHEAD):
            tokens.append(self._following[tokens[-1]])
        return Proposal(name, len(row), tuple(tokens[1:]))


class Liar(Counting):
    """Says anything: right and wrong tokens, ids that no vocabulary has, places that no row has, rows of others."""

    def __init__(self, seed: int):
        super().__init__(late=seed % 3)
        self._random = random.Random(seed)

    def answer(self, name: int, row: list[int]) -> Proposal:
        draw, good = self._random, super().answer(name, row)
        tokens = list(good.tokens)
        kind = draw.randrange(7)
        if kind == 0:
            tokens[draw.randrange(AHEAD)] = draw.choice([-1, -(2**31), VOCAB, 2**31 - 1])
        elif kind == 1:
            tokens[draw.randrange(AHEAD)] = draw.randrange(VOCAB)
        elif kind == 2:
            tokens = [draw.randrange(VOCAB) for _ in range(draw.choice([0, 1, 1000]))]
        position = good.position + (draw.choice([-(2**31), -3, 2, 2**31 - 1]) if kind == 3 else 0)
        return Proposal(draw.randrange(20) if kind == 4 else name, position, tuple(tokens))


class Failing(Counting):
    """Raises from the third call on."""

    calls = 0

    def take(self) -> list[Proposal]:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("broken")
        return super().take()
