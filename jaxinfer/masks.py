"""What the grammars of a step's rows allow, as the step's sampler wants it. No jax here."""

import numpy as np

from jaxinfer.errors import GrammarFailed
from jaxinfer.grammar_masks import MaskFiller
from jaxinfer.sequence import Sequence
from jaxinfer.types import StepPlan


class Masks:
    """For one engine, and its thread. num_rows: R of its prefill steps."""

    def __init__(self, num_rows: int):
        self._num_rows = num_rows
        self._filler = MaskFiller()

    def of(self, plan: StepPlan, rows: list[Sequence]) -> tuple[np.ndarray, dict[int, GrammarFailed]]:
        """i32[R, W], everything allowed in rows without a grammar, and which rows' grammars failed.

        plan: constrained. rows: of the plan, all of whose tokens are known but those that the plan itself samples.
        """
        matchers = [seq.matcher if samples and not seq.finished else None
                    for seq, samples in zip(rows, plan.samples, strict=True)]
        width = next(seq.matcher.grammar.vocabulary.eos.size for seq in rows if seq.matcher is not None)
        masks = np.full((self._num_rows, width), -1, np.int32)
        return masks, self._filler.fill(matchers, masks[:len(rows)])
