"""Masks of all rows of a step at once, on several threads."""

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.fault_points import fault_point
from jaxinfer.grammar_matcher import Matcher
from jaxinfer.llguidance_binding import library

if TYPE_CHECKING:
    import llguidance

log = logging.getLogger(__name__)


class MaskFiller:
    """num_threads: None is four fifths of the machine's cores, 32 at most. For one thread at a time, the engine's.

    Only rows of different grammars run side by side: those of one share a lexer, and take turns at it.
    """

    def __init__(self, num_threads: int | None = None):
        self._num_threads = num_threads

    def fill(self, matchers: Sequence[Matcher | None], out: np.ndarray,
             proposals: Sequence[Sequence[int]] | None = None) -> dict[int, BaseException]:
        """Writes each row's mask; None is a row without a grammar, to which everything is allowed.

        out: u32 or i32[R, W]; with proposals, whose rows hold at most K tokens, [R, K + 1, W] as in
        Matcher.fill_masks_along. Returns the rows that cannot go on, with the reason; their masks allow everything.
        """
        rows = _checked_rows(matchers, out, proposals)
        rows[:] = np.array(-1, np.int32).view(rows.dtype)
        drafts = [()] * len(matchers) if proposals is None else proposals
        quick = {row for row, matcher in enumerate(matchers) if matcher is not None and _is_quick(matcher)}
        failed: dict[int, BaseException] = {}
        try:
            self._fill_quickly(matchers, rows, drafts, quick)
        except BaseException:  # a panic: which row's it is, shows when they are asked one by one
            log.exception("masks of %d rows failed; each is computed alone", len(quick))
            quick = set()
        for row, matcher in enumerate(matchers):
            if matcher is None or (row in quick and not matcher.inner.is_error()):
                continue
            try:
                fault_point("mask")
                matcher.fill_masks_along(drafts[row], rows[row])
            except BaseException as error:  # of this row alone
                failed[row] = error
                rows[row] = np.array(-1, np.int32).view(rows.dtype)
        return failed

    def _fill_quickly(self, matchers: Sequence[Matcher | None], rows: np.ndarray, drafts: Sequence[Sequence[int]],
                      quick: Iterable[int]) -> None:
        width, num_masks = rows.shape[1], rows.shape[0] * rows.shape[1]
        plain, along = [], []
        for row in quick:
            matcher = matchers[row]
            assert matcher is not None  # noqa: S101 (only rows with one are quick)
            draft = _text_of(matcher, drafts[row])
            if draft:
                along.append((matcher.inner, row * width, draft))
            else:
                plain.append((matcher.inner, row * width))
        fault_point("mask")
        address, mask_bytes = rows.ctypes.data, rows.shape[2] * rows.itemsize
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, address, mask_bytes, num_masks)
        if along:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(along, address, mask_bytes, num_masks)

    @cached_property
    def _executor(self) -> "llguidance.LLExecutor":
        return library().LLExecutor(self._num_threads)


def _is_quick(matcher: Matcher) -> bool:
    """Whether llguidance's own masks are ours: not at an end, and no tokens named by id."""
    return not matcher.is_finished and not matcher.grammar.names_tokens


def _text_of(matcher: Matcher, draft: Sequence[int]) -> list[int]:
    """The proposals before an end or an id that is none: llguidance must not see those."""
    vocabulary = matcher.grammar.vocabulary
    stop = next((i for i, id in enumerate(draft) if id in vocabulary.eos_ids or not vocabulary.is_known(id)), None)
    return list(draft[:stop])


def _checked_rows(matchers: Sequence[Matcher | None], out: np.ndarray,
                  proposals: Sequence[Sequence[int]] | None) -> np.ndarray:
    """`out` as [R, K + 1, W]. llguidance writes to its address, so that all of it is checked here."""
    rows = out if proposals is not None else out[:, None] if out.ndim == 2 else out
    longest = max(map(len, proposals), default=0) if proposals is not None else 0
    words = {matcher.grammar.vocabulary.eos.size for matcher in matchers if matcher is not None}
    if (rows.ndim != 3 or not out.flags.c_contiguous or out.dtype not in (np.uint32, np.int32)
            or rows.shape[0] != len(matchers) or rows.shape[1] <= longest or words - {rows.shape[2]}
            or (proposals is not None and len(proposals) != len(matchers))):
        raise ValueError(f"masks of {len(matchers)} rows with up to {longest} proposals do not fit into "
                         f"{out.dtype}{list(out.shape)}; it must be contiguous u32 or i32, [R, W] or [R, K + 1, W], "
                         f"with W {sorted(words)}")
    return rows
