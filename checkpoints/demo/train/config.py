"""The shapes of the two models and of the heads, and the settings of their training."""

from typing import NamedTuple

CONTEXT = 512
VOCABULARY = 4096


class ModelConfig(NamedTuple):
    """The shape of one Llama; the letters are those of the docstrings: D, L, N, K, H, F, V."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 64
    vocabulary: int = VOCABULARY
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


class HeadsConfig(NamedTuple):
    """The shape of the heads; `blocks` are the residual blocks of each."""

    heads: int
    blocks: int


class TrainConfig(NamedTuple):
    """How one model is trained; `batch` counts windows of `context` tokens."""

    steps: int
    batch: int
    seed: int
    matrix_rate: float = 0.02
    other_rate: float = 0.004
    warmup: int = 50
    weight_decay: float = 0.05
    context: int = CONTEXT

    def scaled(self, factor: float) -> "TrainConfig":
        """Return the same settings with the number of steps multiplied by `factor`."""
        return self._replace(steps=max(2, round(self.steps * factor)))


TARGET = ModelConfig(hidden=256, layers=5, heads=8, kv_heads=2, intermediate=640)
DRAFT = ModelConfig(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=512)
TARGET_TRAINING = TrainConfig(steps=1100, batch=8, seed=1)
DRAFT_TRAINING = TrainConfig(steps=1000, batch=8, seed=2)
HEADS = HeadsConfig(heads=4, blocks=2)
HEADS_TRAINING = TrainConfig(steps=1600, batch=2, seed=3, matrix_rate=0.03)
