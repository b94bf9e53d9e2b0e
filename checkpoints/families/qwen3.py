"""Qwen3 (dense): queries and keys normalised per head. Defaults: transformers' Qwen3Config."""

from checkpoints.families.llama_line import IGNORED, LLAMA_RULES, QK_NORM
from checkpoints.families.qwen2 import DEFAULTS
from checkpoints.rules import Family

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    rules=LLAMA_RULES + QK_NORM,
    ignored=IGNORED,
    defaults=DEFAULTS | {"head_dim": 128},
    fixed={"qk_norm": True},
    flags={"attention_bias": ("attention_bias", "attention_out_bias")},
    windows="by_layer",
)
