"""What a committed step means for its rows, apart from the scheduler's books. No jax here."""

import logging
from typing import NamedTuple

from jaxinfer.errors import JaxInferError, NumericFailure, RowFailed, StepFailed
from jaxinfer.prefix_sharing import PrefixSharing
from jaxinfer.sequence import Sequence
from jaxinfer.types import StepPlan, StepResult

log = logging.getLogger(__name__)


class Ending(NamedTuple):
    """reason: "stop" or "length". stop_id: the request's own one that matched; None for end-of-sequence."""

    reason: str
    stop_id: int | None = None


def ending_of(seq: Sequence, ids: list[int]) -> Ending | None:
    """How a row with the new tokens `ids`, its last ones, has ended; None if neither by a stop id nor by its length."""
    if ids and ids[-1] in seq.stop_ids:
        return Ending("stop", ids[-1] if ids[-1] in (seq.request.params.stop_token_ids or ()) else None)
    return Ending("length") if len(seq.tokens) > seq.end else None


def nan_failure(seq: Sequence) -> NumericFailure:
    return NumericFailure(f"the model computed NaN or infinity behind {len(seq.tokens)} tokens of this request; send "
                          "it again, to another server if it ends so again")


def unexplained_end() -> StepFailed:
    return StepFailed("the device stopped this row without a reason; please report it")


def failure(seq: Sequence, error: BaseException) -> Exception:
    """What a row ends with that raised `error`, which may be a panic of a library. Its text stays in the log."""
    if isinstance(error, JaxInferError):
        return error
    log.error("a row of request %r failed; it ends alone", seq.request_id, exc_info=error)
    return RowFailed("this request could not go on; the server's log has the reason")


def take_in_chunks(plan: StepPlan, result: StepResult, rows: list[Sequence], sharing: PrefixSharing) -> None:
    """What chunks bring besides a sampled token: full pages, and prompt scores."""
    for row in range(plan.num_decode_rows, len(rows)):
        seq, ids, start = rows[row], plan.tokens[row], plan.starts[row]
        if not seq.finished:
            sharing.register(seq, start + len(ids))
            if seq.scores is not None and result.prompt_logprobs is not None:
                seq.scores += [one.trimmed(seq.num_prompt_logprobs or 0) for one in result.prompt_logprobs[row]]
