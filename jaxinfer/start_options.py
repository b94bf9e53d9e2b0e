"""What a user may choose when a model is started, checked before anything expensive happens. No jax here."""

import math
from dataclasses import dataclass

from jaxinfer.errors import InvalidConfig
from jaxinfer.request_limits import DEFAULT_LIMITS, RequestLimits

INT32_MAX = 2**31 - 1
"""Sizes become i32 on the device."""

LAST_PORT = 65_535

MOST_DRAFTED = 15
"""Attention on TPUs takes rows of up to 16 queries as one item (`tpu_prefill_blocks.MAX_ROW_QUERIES`)."""

SIZES = ("max_num_seqs", "max_num_batched_tokens", "page_size", "tensor_parallel_size", "max_decode_rounds",
         "max_waiting", "max_waiting_tokens", "num_speculative_tokens")
OPTIONAL_SIZES = ("max_model_len", "num_pages")
SWITCHES = ("enable_prefix_caching", "trust_draft_probs")
OPTIONAL_TEXTS = ("tokenizer", "draft_model", "draft_address", "attention", "int8_matmul", "compile_cache")
DTYPES = ("auto", "float32", "bfloat16")
QUANTIZATIONS = ("int8", "int8_weight_only")
SPECULATIONS = ("draft_model", "ngram", "medusa")
DEMO_HEADS = {"demo": "demo-medusa"}
"""Heads that are shipped for a model."""
KV_CACHE_DTYPES = ("auto", "bfloat16", "float32", "int8", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`LLM` documents each. None means: derived from the model and the machine."""

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    page_size: int = 16
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    speculation: str | None = None
    draft_model: str | None = None
    draft_address: str | None = None
    trust_draft_probs: bool = False
    num_speculative_tokens: int = 4
    enable_prefix_caching: bool = True
    max_decode_rounds: int = 8
    max_waiting: int = 4096
    max_waiting_tokens: int = 4_194_304
    seed: int = 0
    attention: str | None = None
    int8_matmul: str | None = None
    compile_cache: str | None = None
    request_limits: RequestLimits = DEFAULT_LIMITS
    show_progress: bool = True

    @property
    def drafter(self) -> str | None:
        """One of SPECULATIONS or "remote"; None does not speculate."""
        implied = "draft_model" if self.draft_model else "remote" if self.draft_address else None
        return self.speculation or implied

    @property
    def heads(self) -> str:
        """The folder of the heads with `speculation="medusa"`, or their name."""
        return self.draft_model or DEMO_HEADS.get(self.model, "")

    def validate(self) -> None:
        """Raises InvalidConfig naming the field, its value and what it must be."""
        for name in SIZES:
            self._check_size(name)
        for name in OPTIONAL_SIZES:
            if getattr(self, name) is not None:
                self._check_size(name)
        for name in OPTIONAL_TEXTS:
            if not isinstance(getattr(self, name), str | None):
                raise InvalidConfig(name, f"must be a string or None, got {getattr(self, name)!r}")
        for name in SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise InvalidConfig(name, f"must be True or False, got {getattr(self, name)!r}")
        self._check_speculation()
        if self.num_speculative_tokens > MOST_DRAFTED:
            raise InvalidConfig("num_speculative_tokens", f"must be at most {MOST_DRAFTED}, got "
                                f"{self.num_speculative_tokens}; lower it, each round computes them all")
        if self.dtype not in DTYPES:
            raise InvalidConfig("dtype", f"{self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise InvalidConfig("quantization", f"{self.quantization!r} is not one of {', '.join(QUANTIZATIONS)}; "
                                "None keeps the weights as they are stored")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise InvalidConfig("kv_cache_dtype", f"{self.kv_cache_dtype!r} is not one of {', '.join(KV_CACHE_DTYPES)}")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not math.isfinite(share) or not 0 < share <= 1:
            raise InvalidConfig("gpu_memory_utilization", f"must be a share in (0, 1], got {share!r}")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise InvalidConfig("seed", f"must be an integer of 64 bits, got {self.seed!r}")

    def _check_draft_address(self) -> None:
        if self.draft_address is None:
            if self.trust_draft_probs:
                raise InvalidConfig("trust_draft_probs", "is about the drafter at draft_address, which is None; name "
                                    "its host:port or leave trust_draft_probs out")
            return
        host, colon, port = self.draft_address.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and 1 <= int(port) <= LAST_PORT):
            raise InvalidConfig("draft_address", f"must be host:port with a port in 1..{LAST_PORT}, got "
                                f"{self.draft_address!r}")
        for name in ("speculation", "draft_model"):
            if getattr(self, name) is not None:
                raise InvalidConfig("draft_address", f"{self.draft_address!r} is where all proposals come from, but "
                                    f"{name}={getattr(self, name)!r} asks for others; leave one of the two out")

    def _check_speculation(self) -> None:
        self._check_draft_address()
        if self.draft_model == "":
            raise InvalidConfig("draft_model", "is '', which names no model; leave it out to decode without one")
        if self.speculation is not None and self.speculation not in SPECULATIONS:
            raise InvalidConfig("speculation", f"{self.speculation!r} is not one of {', '.join(SPECULATIONS)}; None "
                                "speculates where there is a draft_model")
        if self.speculation == "draft_model" and self.draft_model is None:
            raise InvalidConfig("speculation", "'draft_model' needs draft_model, a model of the same vocabulary")
        if self.speculation == "medusa" and not self.heads:
            raise InvalidConfig("speculation", f"'medusa' needs draft_model, a folder with heads for {self.model}")
        if self.speculation == "ngram" and self.draft_model is not None:
            raise InvalidConfig("speculation", f"{self.speculation!r} has no use for draft_model={self.draft_model!r}; "
                                "leave one of the two out")

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if type(value) is not int or not 1 <= value <= INT32_MAX:
            advice = "; to speculate no more, leave out what drafts" if name == "num_speculative_tokens" else ""
            raise InvalidConfig(name, f"must be an integer of at least 1, got {value!r}{advice}")
