"""Packed i32 results of a step to log-probabilities on the host (`steps.pack_scores` packs them)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.types import MAX_LOGPROBS, StepPlan, TokenLogprobs


@dataclass(frozen=True, slots=True)
class RowLogprobs(Sequence[list[TokenLogprobs]]):
    """Of the sampled tokens of each row, unpacked when asked for: most rows of a step may want none.

    table: i32[rounds, R, W], -1 first where a row has no token. tokens: a row's sampled ids.
    """

    table: np.ndarray
    tokens: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> list[TokenLogprobs]:  # type: ignore[override]
        found = self.table[self.table[:, row, 0] >= 0, row, 1:]
        return [one_score(packed, token) for packed, token in zip(found, self.tokens[row], strict=True)]


def one_score(packed: np.ndarray, token: int) -> TokenLogprobs:
    """packed: i32[W - 1] = log-probability, rank, top ids, top log-probabilities (floats as bits)."""
    top_ids = packed[2:2 + MAX_LOGPROBS].tolist()
    top = packed[2 + MAX_LOGPROBS:].view(np.float32).tolist()
    likeliest = tuple((id_, logprob) for id_, logprob in zip(top_ids, top, strict=True) if id_ >= 0)
    return TokenLogprobs(token, float(packed[:1].view(np.float32)[0]), int(packed[1]), likeliest)


def read_scores(plan: StepPlan, chunks: list[np.ndarray]) -> list[list[TokenLogprobs]]:
    """Scores of each row's prompt positions against the prompt token behind them.

    A row's last position has no known next token once the prompt ends (`next_tokens` is -1): it is left out.
    """
    packed = np.concatenate(chunks)
    scores: list[list[TokenLogprobs]] = []
    first = 0
    for ids, after in zip(plan.tokens, plan.next_tokens, strict=True):
        targets = [token for token in (*ids[1:], after) if token >= 0] if ids else []
        scores.append([one_score(packed[first + offset], token) for offset, token in enumerate(targets)])
        first += len(ids) or 1
    return scores
