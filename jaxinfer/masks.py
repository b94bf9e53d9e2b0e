"""What the grammars of a step's rows allow, as the step's sampler wants it. No jax here."""

import numpy as np

from jaxinfer.grammar_masks import MaskFiller
from jaxinfer.sequence import Sequence
from jaxinfer.types import StepPlan


class Masks:
    """For one engine, and its thread."""

    def __init__(self):
        self._filler = MaskFiller()

    def of(self, plan: StepPlan, rows: list[Sequence], shape: tuple[int, ...], proposed: list[list[int]] | None
           ) -> tuple[np.ndarray, dict[int, BaseException]]:
        """i32[shape], everything allowed in rows without a grammar, and which rows' grammars failed.

        rows: of the plan, all of whose tokens are known but those that the plan itself samples. shape: [R, W], with
        proposals [R, X + 1, W] for the masks before each of them and behind the last.
        """
        matchers = [seq.matcher if samples and not seq.finished else None
                    for seq, samples in zip(rows, plan.samples, strict=True)]
        masks = np.empty(shape, np.int32)
        masks[len(rows):] = -1
        return masks, self._filler.fill(matchers, masks[:len(rows)], proposed)
