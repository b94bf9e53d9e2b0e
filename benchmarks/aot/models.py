"""Shapes of well-known models, so that their steps compile without their files."""

from jaxinfer.config import ModelConfig, RopeConfig


def llama3(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> ModelConfig:
    """Meta Llama 3 (arXiv:2407.21783, table 3): 8 kv heads of width 128, 8,192 positions, base 500,000."""
    return ModelConfig(
        family="llama", vocab_size=128_256, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_layers=num_layers, num_heads=num_heads, num_kv_heads=8, head_dim=128, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=500_000.0), windows=(0,) * num_layers,
    )  # fmt: skip


MODELS = {"8b": llama3(4096, 14_336, 32, 32), "70b": llama3(8192, 28_672, 80, 64)}
