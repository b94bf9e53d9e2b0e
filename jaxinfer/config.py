"""Frozen settings: the model's shape and the engine's limits. Derived values are properties."""

from dataclasses import dataclass, field

from jaxinfer.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding as Hugging Face configs describe it.

    kind: "default", "linear", "dynamic", "yarn" or "llama3"; the rest are that kind's own numbers
    (None where the file is silent).
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder; one field for each way in which families differ.

    windows: sliding window of each layer in tokens, 0 for none (length L).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the engine; all sizes are in tokens, rows or pages.

    max_model_len: longest prompt + output. page_size: tokens a page (C). num_pages: pages in the pool (P).
    max_num_seqs: rows that run at once. max_num_batched_tokens: token budget of a step.
    max_decode_rounds: decode rounds fused into one device call while nobody waits.
    num_speculative_tokens: most tokens drafted for a row in a round; 0 does not speculate.
    max_waiting: requests that may queue before Overloaded. grammars: whether rows may have one; programs are compiled
    for it.
    """

    max_model_len: int
    num_pages: int
    page_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_decode_rounds: int = 8
    num_speculative_tokens: int = 0
    enable_prefix_caching: bool = True
    max_waiting: int = 4096
    seed: int = 0
    grammars: bool = False
    token_buckets: tuple[int, ...] = field(default=())
    row_buckets: tuple[int, ...] = field(default=())

    def __post_init__(self):
        object.__setattr__(self, "token_buckets", self.token_buckets or token_sizes(self.max_num_batched_tokens))
        object.__setattr__(self, "row_buckets", self.row_buckets or row_sizes(self.max_num_seqs))
        self.validate()

    @property
    def max_pages_per_row(self) -> int:
        """Pages a row of max_model_len tokens needs (M)."""
        return -(-self.max_model_len // self.page_size)

    def validate(self) -> None:
        """Raises InvalidConfig naming the field, the value and what to do."""
        for name in ("max_model_len", "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens",
                     "max_decode_rounds", "max_waiting"):
            if getattr(self, name) < 1:
                raise InvalidConfig(name, f"must be at least 1, got {getattr(self, name)}")
        if self.num_speculative_tokens < 0:
            raise InvalidConfig("num_speculative_tokens", f"must be at least 0, got {self.num_speculative_tokens}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidConfig("max_num_batched_tokens", f"{self.max_num_batched_tokens} is under max_num_seqs "
                                f"{self.max_num_seqs}: a step could not decode every row; raise it or lower "
                                "max_num_seqs")
        if self.num_pages < max(self.max_num_seqs, self.max_pages_per_row):
            raise InvalidConfig("num_pages", f"{self.num_pages} pages of {self.page_size} tokens cannot hold one page "
                                f"a row (max_num_seqs={self.max_num_seqs}) and one row of max_model_len="
                                f"{self.max_model_len} ({self.max_pages_per_row} pages); raise num_pages or the "
                                "memory share, or lower max_model_len or max_num_seqs")


FEW_TOKENS, USUAL_TOKENS = 8, 64


def token_sizes(largest: int, least: int = FEW_TOKENS) -> tuple[int, ...]:
    """Packed-token sizes T that prefill is compiled for, of at least `least`: the budget and its halves, six sizes of
    64 tokens or more, and one for a few tokens: of rows with a grammar, and behind a prefix that was found.

    A mixed step pays for every padded token where compute is scarce, so the sizes are a factor of two apart.
    """
    halves = {-(-(largest >> shift) // 8) * 8 for shift in range(1, 6)}
    sizes = {FEW_TOKENS, *(size for size in halves if size >= USUAL_TOKENS)}
    return (*sorted(size for size in sizes if least <= size < largest), largest)


def row_sizes(largest: int, least: int = 2) -> tuple[int, ...]:
    """Row counts R that decode is compiled for, each with three samplers: so a factor of four apart, and four at most.

    At least 2: one-row bfloat16 matmuls are slow on XLA:CPU.
    """
    largest = max(largest, 2)
    smallest = max(least, 1 << max((largest - 1).bit_length() - 6, 1))
    sizes = [smallest << shift for shift in (0, 2, 4) if smallest << shift < largest]
    return (*sizes, largest)
