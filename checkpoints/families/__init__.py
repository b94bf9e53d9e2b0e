"""The supported model families, each a table."""

from checkpoints.families.llama import LLAMA
from checkpoints.families.mistral import MISTRAL
from checkpoints.families.qwen2 import QWEN2
from checkpoints.families.qwen3 import QWEN3

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

__all__ = ["FAMILIES"]
