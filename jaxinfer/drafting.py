"""The draft model of a start: checked before anything is loaded, then paired with its target."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxinfer import loading
from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.errors import InvalidConfig
from jaxinfer.model import Model
from jaxinfer.models import make_decoder
from jaxinfer.start_options import Options


def check_draft_model(options: Options, target: Path, max_model_len: int, dtype: Any, mesh: jax.sharding.Mesh | None
                      ) -> None:  # fmt: skip
    """Raises InvalidConfig where the draft model cannot serve the target, ModelFormatError where it cannot be read."""
    if options.draft_model is None:
        return
    draft, served = loading.read_config(loading.model_folder(options.draft_model)), loading.read_config(target)
    if draft.vocab_size != served.vocab_size:
        raise InvalidConfig("draft_model", f"{options.draft_model} has {draft.vocab_size} tokens, {options.model} has "
                            f"{served.vocab_size}; choose one with the same vocabulary, of the same padded size")
    if draft.max_position_embeddings < max_model_len:
        raise InvalidConfig("draft_model", f"{options.draft_model} takes {draft.max_position_embeddings} positions, "
                            f"fewer than max_model_len={max_model_len}; lower max_model_len")
    make_decoder(draft, dtype=dtype, page_size=options.page_size, mesh=mesh)  # can it be cut, and attended to?


def with_draft_model(options: Options, target: Model, params: Any, dtype: Any, mesh: jax.sharding.Mesh | None,
                     say: Callable[[str], None]) -> tuple[Any, Any]:  # fmt: skip
    """The target alone, or paired with the draft model of the options; the parameters likewise.

    The draft model has the target's dtype of activations, its pages too; its weights are as they are stored.
    """
    if options.draft_model is None:
        return target, params
    began = time.monotonic()
    loaded = loading.load_model(options.draft_model, dtype=dtype, mesh=mesh)
    draft = make_decoder(loaded.config, dtype=dtype, page_size=options.page_size, mesh=mesh)
    say(f"loaded draft model {options.draft_model} in {time.monotonic() - began:.1f} s; it proposes up to "
        f"{options.num_speculative_tokens} tokens a round")
    return DraftPair(target, DraftModel(draft, options.num_speculative_tokens)), Pair(params, loaded.params)
