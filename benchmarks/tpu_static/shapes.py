"""What is counted: shapes of attention, and the figures of a compiled program. Free of libtpu."""

from dataclasses import dataclass

ITEM_BYTES = {"bfloat16": 2, "int8": 1, "float8_e4m3fn": 1, "float32": 4}


@dataclass(frozen=True)
class AttentionShape:
    """Rows of equal lengths: each has q_len new tokens and `context` tokens with them, in full pages."""

    rows: int
    q_len: int
    context: int
    page_size: int = 16
    kv_dtype: str = "bfloat16"
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def title(self) -> str:
        return f"{self.rows} x {self.q_len} at {self.context}, pages of {self.page_size} {self.kv_dtype}"

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all rows, once."""
        width = 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.kv_dtype]
        return self.rows * self.context * width

    @property
    def ideal_bytes(self) -> int:
        """Each key and value once, queries in, outputs out, new keys and values in and out."""
        new = self.rows * self.q_len
        queries = 2 * new * self.num_q_heads * self.head_dim * 2
        return self.kv_bytes + queries + 2 * new * self.kv_bytes // (self.rows * self.context)

    @property
    def flops(self) -> int:
        """Both products over the pairs of query and key that causality lets see each other."""
        pairs = sum(range(self.context - self.q_len + 1, self.context + 1))
        return self.rows * pairs * 4 * self.num_q_heads * self.head_dim


@dataclass(frozen=True)
class Count:
    """One program, predicted.

    Fields:
      bundles: issued, in all its kernels and fusions; around: those outside of the Pallas kernels.
      bytes_moved: by DMAs between HBM and the core.
      hot_bundles, hot_passes: of the loop in which most are issued, one pass, and passes.
      spilling: share of its bundles that store a spilled register; fills: loads of those in one pass.
      step_fill, whole_fill: share of the matrix units' slots in use, in the step that the largest kernel repeats most,
        and over all bundles.
    """

    bundles: int
    around: int
    bytes_moved: int
    hot_bundles: int
    hot_passes: int
    spilling: float
    fills: int
    step_fill: float
    whole_fill: float


@dataclass(frozen=True)
class MatmulShape:
    """x [rows, D] times values i8[F, D], one layer's of a stack."""

    rows: int
    in_features: int
    out_features: int

    @property
    def ideal_bytes(self) -> int:
        """The weight, its scales, x in and the result out, once each."""
        weight = self.out_features * (self.in_features + 4)
        return weight + 2 * self.rows * (self.in_features + self.out_features)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.in_features * self.out_features
