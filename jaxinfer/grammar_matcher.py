"""One row's place in its grammar: what the tokens so far have made of it, which may follow."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.errors import GrammarFailed
from jaxinfer.llguidance_binding import problem_of
from jaxinfer.structured_output import FIELD
from jaxinfer.types import MASK_BITS

if TYPE_CHECKING:
    import llguidance

    from jaxinfer.grammar import CompiledGrammar

FREE_SECONDS = 0.0005
"""Of the engine's thread for taking in a token: a small JSON schema takes 0.022 ms, at most 0.37; a small ambiguous
grammar (`e: e e | "a" | "b"`) 6.9 ms over 200 tokens and about as much again for each mask (AMD EPYC, 2026-11-30).
"""
MOST_SECONDS = 0.1
"""What a row may take beyond that. Every request waits for it, and no limit of llguidance's bounds it."""


class Matcher:
    """Not thread-safe: one thread at a time, the engine's. Every method may raise GrammarFailed; then this row cannot
    go on, which concerns no other.

    A mask is u32[W] or i32[W], W = ceil(V / 32): id i is bit i % 32 of word i // 32, set where i is legal.
    End-of-sequence ids are legal exactly where the output is complete; after one, only they are.
    """

    def __init__(self, grammar: "CompiledGrammar", inner: "llguidance.LLMatcher"):
        self.grammar = grammar
        self.inner = inner
        """llguidance's matcher, for masks of many rows at once."""
        self._overdrawn = 0.0  # seconds beyond FREE_SECONDS for each token
        self._is_shared = True
        self._tokens: list[int] = []
        self._num_ends = 0  # llguidance takes an end back by a rollback in some states only, so it never sees one

    @property
    def num_tokens(self) -> int:
        """Tokens of the output so far, end-of-sequence included."""
        return len(self._tokens) + self._num_ends

    @property
    def is_complete(self) -> bool:
        """Whether the output may end here: end-of-sequence is legal."""
        return self._num_ends > 0 or self.inner.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether the output must end here: nothing but end-of-sequence is legal."""
        return self._num_ends > 0 or (self.inner.is_stopped() and not self.inner.is_error())

    def fill_mask(self, mask: np.ndarray) -> None:
        """Writes the ids that may come next."""
        _check_mask(mask, self.grammar.vocabulary.eos.size)
        if self.is_finished:
            mask[:] = self.grammar.vocabulary.eos.view(mask.dtype)
            return
        self._compute(mask)
        if self.inner.is_error():
            self._recover()
            self._compute(mask)
        if self.inner.is_error():
            raise self._failure(problem_of(self.inner))
        if self.grammar.names_tokens:
            self._clean(mask)

    def fill_masks_along(self, proposed: Sequence[int], masks: np.ndarray) -> int:
        """Writes the masks along k proposed tokens, masks[i] after the first i; returns how many tokens are legal.

        masks: [at least k + 1, W]. Places behind the first illegal token or behind an end get masks that allow
        everything: what is proposed there is dropped anyway. The matcher stays where it was.
        """
        masks[:] = np.array(-1, np.int32).view(masks.dtype)
        before = self.num_tokens
        for i, token in enumerate(proposed):
            self.fill_mask(masks[i])
            if not allows(masks[i], token):
                break
            self.advance((token,))
            if self._num_ends:
                break
        else:
            self.fill_mask(masks[len(proposed)])
        num_legal = self.num_tokens - before
        self.rollback(num_legal)
        return num_legal

    def valid_prefix(self, proposed: Sequence[int]) -> int:
        """How many of the proposed tokens are legal one after the other; an end is the last that can be. Changes
        nothing.
        """
        if not proposed or self.is_finished:
            return int(bool(proposed) and self._is_end(proposed[0]))
        vocabulary = self.grammar.vocabulary
        num_known = next((i for i, id in enumerate(proposed) if not vocabulary.is_known(id)), len(proposed))
        return self.inner.validate_tokens(list(proposed[:num_known]))

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes tokens of the output. Raises GrammarFailed at an illegal one; those before it are taken."""
        num_text = next((i for i, id in enumerate(tokens) if self._is_end(id)), len(tokens))
        if self._num_ends:
            num_text = 0  # no text after an end
        self._consume(list(tokens[:num_text]))
        for id in tokens[num_text:]:
            if not (self._is_end(id) and self.is_complete):
                raise self._failure(f"token {id} is not legal after {self.num_tokens} tokens")
            self._num_ends += 1

    def advance_to_end(self, tokens: Sequence[int]) -> int:
        """Takes in tokens up to the first behind which nothing but end-of-sequence may follow; how many those are.

        Raises GrammarFailed, too, when the row has taken too much of the thread's time.
        """
        began, taken = time.thread_time(), len(tokens)
        for count, id in enumerate(tokens, 1):
            self.advance((id,))
            if self.is_finished:
                taken = count
                break
        self._overdrawn = max(self._overdrawn + time.thread_time() - began - FREE_SECONDS * taken, 0.0)
        if self._overdrawn > MOST_SECONDS:
            raise self._failure(f"following {self.num_tokens} tokens took {MOST_SECONDS:g} s more than "
                                f"{FREE_SECONDS * 1e3:g} ms each, the limit")
        return taken

    def rollback(self, num_tokens: int) -> None:
        """Takes the last tokens back. Raises ValueError when there are not so many."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"cannot take back {num_tokens} of {self.num_tokens} tokens")
        num_ends = min(num_tokens, self._num_ends)
        self._num_ends -= num_ends
        num_text = num_tokens - num_ends
        if num_text:
            del self._tokens[-num_text:]
            if not self.inner.rollback(num_text):
                self._recover()

    def copy(self) -> "Matcher":
        """A second matcher at the same place, for another sample."""
        self._is_shared = True
        found = Matcher(self.grammar, self.inner.deep_copy())
        found._tokens, found._num_ends = list(self._tokens), self._num_ends
        return found

    def _is_end(self, id: int) -> bool:
        return id in self.grammar.vocabulary.eos_ids

    def _consume(self, tokens: list[int]) -> None:
        vocabulary = self.grammar.vocabulary
        num_known = next((i for i, id in enumerate(tokens) if not vocabulary.is_known(id)), len(tokens))
        num_taken = self._tried(tokens[:num_known])
        if num_taken < num_known and self._is_shared:
            self._recover()  # the token may be legal and the shared lexer broken: both look the same
            num_taken += self._tried(tokens[num_taken:num_known])
        if num_taken < len(tokens):
            problem = problem_of(self.inner) or f"token {tokens[num_taken]} is not legal after {self.num_tokens} tokens"
            raise self._failure(problem)

    def _tried(self, tokens: list[int]) -> int:
        num_taken = self.inner.try_consume_tokens(tokens) if tokens else 0
        self._tokens += tokens[:num_taken]
        return num_taken

    def _recover(self) -> None:
        """Away from a broken lexer that other rows may have broken, to one of our own."""
        if not self._is_shared:
            raise self._failure(problem_of(self.inner))
        problem = problem_of(self.inner)
        self.inner, self._is_shared = self.grammar.rebuilt(), False
        if self._tokens and self.inner.try_consume_tokens(self._tokens) < len(self._tokens):
            raise self._failure(problem_of(self.inner) or problem)

    def _compute(self, mask: np.ndarray) -> None:
        self.inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def _clean(self, mask: np.ndarray) -> None:
        """For grammars that name tokens by id: no unknown ids, and an end only where the output is complete."""
        vocabulary = self.grammar.vocabulary
        mask &= vocabulary.known.view(mask.dtype)
        if not self.inner.is_accepting():
            mask &= ~vocabulary.eos.view(mask.dtype)
        if not mask.any():
            raise self._failure("no token may follow")

    def _failure(self, problem: str) -> GrammarFailed:
        return GrammarFailed(f"{FIELD}.{self.grammar.kind}", f"{problem or 'the grammar failed'}; make it simpler")


def allows(mask: np.ndarray, id: int) -> bool:
    """Whether the mask u32[W] or i32[W] has the bit of `id`."""
    return 0 <= id < MASK_BITS * mask.size and bool(int(mask[id // MASK_BITS]) >> (id % MASK_BITS) & 1)


def _check_mask(mask: np.ndarray, num_words: int) -> None:
    # llguidance writes to the address.
    if mask.shape != (num_words,) or mask.dtype not in (np.uint32, np.int32) or not mask.flags.c_contiguous:
        raise ValueError(f"a mask is contiguous u32 or i32[{num_words}], got {mask.dtype}{list(mask.shape)}")
