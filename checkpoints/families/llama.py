"""Llama 2, 3, 3.1, 3.2, TinyLlama and whatever shares their class. Defaults: transformers' LlamaConfig."""

from checkpoints.families.llama_line import IGNORED, LLAMA_RULES
from checkpoints.rules import Family

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    rules=LLAMA_RULES,
    ignored=IGNORED,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    flags={"attention_bias": ("attention_bias", "attention_out_bias"), "mlp_bias": ("mlp_bias",)},
)
