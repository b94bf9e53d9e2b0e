"""Sources of proposals for an engine with the counting model: one that is right, liars, and one that fails."""

import random
from collections.abc import Sequence

from counting import VOCAB

from jaxinfer.remote_drafts import Proposal

AHEAD = 20


class Counting:
    """Proposes what will come, at once. late: answers that it keeps back."""

    def __init__(self, late: int = 0):
        self.rows: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.closed = False
        self._answers: list[list[Proposal]] = [[] for _ in range(late + 1)]

    def tell(self, name: int, position: int, tokens: Sequence[int]) -> None:
        assert name not in self.ended and tokens
        row = self.rows.setdefault(name, [])
        assert position == len(row)
        row += tokens
        self._answers[-1].append(self.answer(name, row))

    def answer(self, name: int, row: list[int]) -> Proposal:
        return Proposal(name, len(row), tuple((row[-1] + 1 + offset) % VOCAB for offset in range(AHEAD)))

    def forget(self, name: int) -> None:
        del self.rows[name]
        self.ended.add(name)

    def take(self) -> list[Proposal]:
        self._answers.append([])
        return self._answers.pop(0)

    def close(self) -> None:
        self.closed = True


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
