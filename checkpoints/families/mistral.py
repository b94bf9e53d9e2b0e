"""Mistral 7B and successors of its class. Defaults: transformers' MistralConfig (a missing window is 4096, a null one
is none).
"""

from checkpoints.families.llama_line import IGNORED, LLAMA_RULES
from checkpoints.rules import Family

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    rules=LLAMA_RULES,
    ignored=IGNORED,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    windows="all",
)
