"""Heads on the target's last hidden state, with which it drafts for itself: pure functions over a parameter tree.

Medusa's scheme (Cai et al. 2024, arXiv:2401.10774): small residual blocks on the hidden state, then the target's own
final norm and head. As in Hydra (Ankner et al. 2024, arXiv:2402.05109) a head also sees the token before the one it
predicts, so that every proposal knows those before it; it reads the state that the head before it made in place of
Hydra's embeddings of all tokens since.

Letters: R rows, D model width.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.linear import linear
from jaxinfer.models.norm import rms_norm
from jaxinfer.params import Params, ParamSpec


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """The shape of heads. target_fingerprint: of `checkpoints.heads.fingerprint`."""

    num_heads: int
    num_blocks: int
    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    target_fingerprint: str


def head_specs(config: HeadsConfig, dtype: Any) -> Params:
    """The tree of ParamSpec: `{"heads": (head, ...)}`. Heads are small and lie whole on every device."""
    width = config.hidden_size
    vector = ParamSpec((width,), dtype, ("model",), "ones")
    bias = ParamSpec((width,), dtype, ("model",), "zeros")

    def matrix(ins: int) -> ParamSpec:
        return ParamSpec((ins, width), dtype, ("model", "model"), in_axis=0, out_axis=1)

    head = {
        "state_norm": {"weight": vector},
        "token_norm": {"weight": vector},
        "input": {"weight": matrix(2 * width)},
        "blocks": ({"weight": matrix(width), "bias": bias},) * config.num_blocks,
    }
    return {"heads": (head,) * config.num_heads}


def advance(head: Params, eps: float, state: jax.Array, embedded: jax.Array) -> jax.Array:
    """A head's state [R, D], whose logits are the target's of a hidden state.

    Args:
      head: one of the tree's heads.
      state: [R, D], of the head before it; of the first head the target's hidden state before the final norm.
      embedded: [R, D], the target's embedding of the token between: the one that the state before predicts.
    """
    parts = rms_norm(state, head["state_norm"]["weight"], eps), rms_norm(embedded, head["token_norm"]["weight"], eps)
    x = linear(jnp.concatenate(parts, axis=-1), head["input"]["weight"])
    for block in head["blocks"]:
        x = x + jax.nn.silu(linear(x, block["weight"]) + block["bias"])
    return x
