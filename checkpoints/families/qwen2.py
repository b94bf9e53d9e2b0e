"""Qwen2 and Qwen2.5 (dense): biases on q, k and v. Defaults: transformers' Qwen2Config."""

from checkpoints.families.llama_line import IGNORED, LLAMA_RULES
from checkpoints.rules import Family

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=LLAMA_RULES,
    ignored=IGNORED,
    defaults=DEFAULTS,
    fixed={"attention_bias": True},
    windows="by_layer",
)
