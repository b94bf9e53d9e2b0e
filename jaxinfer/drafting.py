"""The drafter of a start: what fits its target is checked before that is loaded; then target and drafter are paired."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxinfer import loading
from jaxinfer.config import ModelConfig
from jaxinfer.draft_model import DraftModel
from jaxinfer.draft_pair import DraftPair, Pair
from jaxinfer.errors import InvalidConfig
from jaxinfer.medusa_drafter import DecoderHeads, MedusaDrafter
from jaxinfer.models import Decoder, make_decoder
from jaxinfer.prompt_lookup import PromptLookup
from jaxinfer.remote_drafts import RemoteDrafts, num_ahead
from jaxinfer.remote_proposals import RemoteProposals
from jaxinfer.start_options import Options
from jaxinfer.types import MAX_CANDIDATES


def check_drafter(options: Options, target: Path, max_model_len: int, dtype: Any, mesh: jax.sharding.Mesh | None
                  ) -> None:  # fmt: skip
    """Raises InvalidConfig where draft model or heads cannot serve the target, ModelFormatError where they cannot be
    read.
    """
    if options.drafter == "draft_model":
        check_draft_model(options, loading.read_config(target), max_model_len, dtype, mesh)
    if options.drafter == "medusa":
        check_heads(options, loading.read_config(target))


def check_draft_model(options: Options, served: ModelConfig, max_model_len: int, dtype: Any,
                      mesh: jax.sharding.Mesh | None) -> None:  # fmt: skip
    draft = loading.read_config(loading.model_folder(options.draft_model or ""))
    if draft.vocab_size != served.vocab_size:
        raise InvalidConfig("draft_model", f"{options.draft_model} has {draft.vocab_size} tokens, {options.model} has "
                            f"{served.vocab_size}; choose one with the same vocabulary, of the same padded size")
    if draft.max_position_embeddings < max_model_len:
        raise InvalidConfig("draft_model", f"{options.draft_model} takes {draft.max_position_embeddings} positions, "
                            f"fewer than max_model_len={max_model_len}; lower max_model_len")
    make_decoder(draft, dtype=dtype, page_size=options.page_size, mesh=mesh)  # can it be cut, and attended to?


def check_heads(options: Options, served: ModelConfig) -> None:
    config = loading.read_heads_config(loading.model_folder(options.heads))
    for name, size, wanted in (("hidden states", config.hidden_size, served.hidden_size),
                               ("tokens", config.vocab_size, served.vocab_size)):  # fmt: skip
        if size != wanted:
            raise InvalidConfig("draft_model", f"{options.heads} has heads for {size} {name}, {options.model} has "
                                f"{wanted}; name heads that were trained on this model")
    if options.num_speculative_tokens > config.num_heads:
        raise InvalidConfig("num_speculative_tokens", f"must be at most {config.num_heads}, the number of heads in "
                            f"{options.heads}, got {options.num_speculative_tokens}")


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
        remote = RemoteProposals(count, kept, options.max_num_seqs, target.mesh, num_candidates(options))
        return DraftPair(target, remote), Pair(params, ())
    load = load_heads if options.drafter == "medusa" else load_draft_model
    drafter, own = load(options, target, params, say)
    return DraftPair(target, drafter), Pair(params, own)


def num_candidates(options: Options) -> int:
    """Of the distribution that is wanted with each proposal from elsewhere; 0 takes given tokens."""
    return MAX_CANDIDATES if options.trust_draft_probs else 0


def remote_drafts(options: Options, vocab_size: int) -> RemoteDrafts | None:
    """The connection to the drafter at `draft_address`, which need not be there yet; None without one."""
    if options.draft_address is None:
        return None
    from jaxinfer.draft_client import DraftClient  # gRPC is imported by those who use it

    kept, candidates = num_ahead(options.num_speculative_tokens), num_candidates(options)
    return RemoteDrafts(DraftClient(options.draft_address, kept, candidates), vocab_size, kept, candidates)


def load_draft_model(options: Options, target: Decoder, _: Any, say: Callable[[str], None]
                     ) -> tuple[DraftModel, Any]:  # fmt: skip
    """The draft model of the options, with its parameters.

    It has the target's dtype of activations, its pages too; its weights are as they are stored.
    """
    began, name = time.monotonic(), options.draft_model or ""
    loaded = loading.load_model(name, dtype=target.dtype, mesh=target.mesh)
    draft = make_decoder(loaded.config, dtype=target.dtype, page_size=options.page_size, mesh=target.mesh)
    say(f"loaded draft model {name} in {time.monotonic() - began:.1f} s; it proposes up to "
        f"{options.num_speculative_tokens} tokens a round")
    return DraftModel(draft, options.num_speculative_tokens), loaded.params


def load_heads(options: Options, target: Decoder, params: Any, say: Callable[[str], None]
               ) -> tuple[MedusaDrafter, Any]:  # fmt: skip
    """The heads of the options, with their parameters in the target's dtype of activations.

    Raises InvalidConfig for heads of another target, by its parameters.
    """
    began, folder, count = time.monotonic(), loading.model_folder(options.heads), options.num_speculative_tokens
    config, found = loading.read_heads_config(folder), loading.target_fingerprint(params)
    if config.target_fingerprint != found:
        raise InvalidConfig("draft_model", f"{options.heads} has heads for a target whose final norm has SHA-256 "
                            f"{config.target_fingerprint[:16]}..., that of {options.model} is {found[:16]}...; name "
                            "heads that were trained on this model")
    own = loading.load_heads(folder, config, dtype=target.dtype, mesh=target.mesh)
    say(f"loaded heads {options.heads} in {time.monotonic() - began:.1f} s; they propose up to {count} tokens a round")
    drafter = MedusaDrafter(target, DecoderHeads(config, target), count, options.max_num_seqs, config.hidden_size,
                            target.dtype, target.mesh)  # fmt: skip
    return drafter, own
