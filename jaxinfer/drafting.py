"""The drafter of a start: a draft model is checked before anything is loaded; then target and drafter are paired."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxinfer import loading
from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.errors import InvalidConfig
from jaxinfer.models import Decoder, make_decoder
from jaxinfer.prompt_lookup import PromptLookup
from jaxinfer.remote_drafts import RemoteDrafts, num_ahead
from jaxinfer.remote_proposals import RemoteProposals
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


def with_drafter(options: Options, target: Decoder, params: Any, max_model_len: int, say: Callable[[str], None]
                 ) -> tuple[Any, Any]:  # fmt: skip
    """The target alone, or paired with the drafter of the options; the parameters likewise."""
    if options.drafter is None:
        return target, params
    count = options.num_speculative_tokens
    if options.drafter == "ngram":
        say(f"prompt lookup proposes up to {count} tokens a round")
        lookup = PromptLookup(count, options.max_num_seqs, max_model_len, target.mesh)
        return DraftPair(target, lookup), Pair(params, ())
    if options.drafter == "remote":
        say(f"{options.draft_address} proposes up to {count} tokens a round")
        kept = num_ahead(count)
        return DraftPair(target, RemoteProposals(count, kept, options.max_num_seqs, target.mesh)), Pair(params, ())
    drafter, own = load_draft_model(options, target, say)
    return DraftPair(target, drafter), Pair(params, own)


def remote_drafts(options: Options, vocab_size: int) -> RemoteDrafts | None:
    """The connection to the drafter at `draft_address`, which need not be there yet; None without one."""
    if options.draft_address is None:
        return None
    from jaxinfer.draft_client import DraftClient  # gRPC is imported by those who use it

    kept = num_ahead(options.num_speculative_tokens)
    return RemoteDrafts(DraftClient(options.draft_address, kept), vocab_size, kept)


def load_draft_model(options: Options, target: Decoder, say: Callable[[str], None]) -> tuple[DraftModel, Any]:
    """The draft model of the options, with its parameters.

    It has the target's dtype of activations, its pages too; its weights are as they are stored.
    """
    began, name = time.monotonic(), options.draft_model or ""
    loaded = loading.load_model(name, dtype=target.dtype, mesh=target.mesh)
    draft = make_decoder(loaded.config, dtype=target.dtype, page_size=options.page_size, mesh=target.mesh)
    say(f"loaded draft model {name} in {time.monotonic() - began:.1f} s; it proposes up to "
        f"{options.num_speculative_tokens} tokens a round")
    return DraftModel(draft, options.num_speculative_tokens), loaded.params
