"""Llama by the book in NumPy: no pages, no cache, no batch, the whole context again for every token.

The independent answer that engine output is compared with. Weights are read by their Hugging Face names.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxinfer.noise import gumbel, row_keys
from jaxinfer.types import Request

TIE = 1e-4
"""Closer than this the two best candidates may swap between buckets (float32 sums in another order)."""


class PlainLlama:
    """A folder with a tied or untied Llama checkpoint in float32, default rope."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def logits(self, ids: list[int]) -> np.ndarray:
        """f32[V] after the last of `ids`."""
        weights, config = self.weights, self.config
        x = weights["model.embed_tokens.weight"][ids]
        for layer in range(config["num_hidden_layers"]):
            part = {name.removeprefix(f"model.layers.{layer}."): weight for name, weight in weights.items()
                    if name.startswith(f"model.layers.{layer}.")}
            x = x + self._attend(part, self._norm(x, part["input_layernorm.weight"]))
            x = x + self._feed_forward(part, self._norm(x, part["post_attention_layernorm.weight"]))
        last = self._norm(x[-1:], weights["model.norm.weight"])
        return (last @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T)[0]

    def _norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * scale

    def _feed_forward(self, part: dict, x: np.ndarray) -> np.ndarray:
        gate = x @ part["mlp.gate_proj.weight"].T
        return (gate / (1 + np.exp(-gate)) * (x @ part["mlp.up_proj.weight"].T)) @ part["mlp.down_proj.weight"].T

    def _attend(self, part: dict, x: np.ndarray) -> np.ndarray:
        width, heads = self.config["head_dim"], self.config["num_attention_heads"]
        q, k, v = (self._heads(x @ part[f"self_attn.{name}_proj.weight"].T, width) for name in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(one, heads // one.shape[1], axis=1) for one in (k, v))
        scores = np.einsum("snh,tnh->nst", q, k) / np.sqrt(width)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return np.einsum("nst,tnh->snh", shares, v).reshape(len(x), -1) @ part["self_attn.o_proj.weight"].T

    @staticmethod
    def _heads(x: np.ndarray, width: int) -> np.ndarray:
        return x.reshape(len(x), -1, width)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angles = np.outer(np.arange(len(x)), self.config["rope_parameters"]["rope_theta"] ** (-np.arange(half) / half))
        both = np.concatenate([angles, angles], -1)[:, None]
        cos, sin = np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)
        return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def decode(model: PlainLlama, request: Request, index: int) -> tuple[list[int], int | None]:
    """The tokens of sample `index`, and the first position where the two best were too close to call (or None)."""
    ids = list(request.prompt)
    seed = request.seed & (2**64 - 1)
    words = jnp.array([[seed >> 32, seed & 0xFFFFFFFF]], jnp.uint32)
    keys = row_keys(words, jnp.array([index], jnp.int32))
    tie = None
    while len(ids) - len(request.prompt) < request.max_tokens:
        values = model.logits(ids)
        if request.params.temperature:
            values = values / request.params.temperature
            values = values + np.asarray(gumbel(keys, jnp.array([len(ids)]), len(values)))[0]
        best = np.argsort(-values)[:2]
        if tie is None and values[best[0]] - values[best[1]] < TIE:
            tie = len(ids) - len(request.prompt)
        ids.append(int(best[0]))
        if ids[-1] in request.stop_ids:
            break
    return ids[len(request.prompt):], tie
