"""What a run is asked to do, checked before anything is sent. No grpc here."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxinfer.errors import InvalidConfig

GOODPUT_KEYS = ("ttft", "tpot", "e2el")
METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "server_ttft", "server_queue")
"""What percentiles are known of."""
DATASETS = ("random", "custom", "sharegpt")
REQUESTS_A_CONNECTION = 200
"""More of them share the client's work. Ours lets a connection run 9,216 calls by default, many HTTP/2 servers and
proxies 256; the library would hold back what is more, unseen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """`jaxinfer.bench_serve_options` explains each field; wrong ones raise InvalidConfig. Times are seconds.

    goodput: words KEY:MS, also several in one.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    address: str | None = None
    ready_check_timeout_sec: float = 0.0
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_server_name: str | None = None
    token_file: str | None = None
    insecure: bool = False
    connections: int | None = None
    metrics_url: str | None = None
    num_prompts: int = 1000
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    timeout: float | None = None
    seed: int = 0
    dataset_name: str | None = None
    dataset_path: str | None = None
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    cache_salt: str | None = None
    output_len: int | None = None
    ignore_eos: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    metric_percentiles: str = "99"
    save_result: str | None = None
    save_detailed: bool = False
    plot: str | None = None
    json: bool = False
    disable_tqdm: bool = False
    goodput: Sequence[str] | None = field(default=None)

    def __post_init__(self):
        self._check_load()
        self._check_dataset()
        self._check_server()
        self._check_output()
        for name in ("limits", "metrics", "percentiles"):
            getattr(self, name)  # raises now, not behind the run

    @property
    def target(self) -> str:
        """What a channel is opened to."""
        if self.address is not None:
            return self.address
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def uses_tls(self) -> bool:
        return self.tls or any((self.tls_ca, self.tls_cert, self.tls_server_name))

    @property
    def dataset(self) -> str:
        """One of DATASETS."""
        if self.dataset_name is not None:
            return self.dataset_name
        if self.dataset_path is None:
            return "random"
        return "sharegpt" if self.dataset_path.endswith(".json") else "custom"

    @property
    def num_connections(self) -> int:
        at_once = min(self.num_prompts, self.max_concurrency or self.num_prompts)
        return self.connections or -(-at_once // REQUESTS_A_CONNECTION)

    @property
    def is_closed_loop(self) -> bool:
        """Whether a request is due only when another one has ended: then there is no schedule to be late for."""
        return math.isinf(self.request_rate) and self.max_concurrency is not None

    @property
    def limits(self) -> dict[str, float]:
        """Goodput's limits in milliseconds, by key."""
        found: dict[str, float] = {}
        for word in " ".join(self.goodput or ()).replace(",", " ").split():
            key, colon, text = word.partition(":")
            if key not in GOODPUT_KEYS:
                raise InvalidConfig("goodput", f"{key!r} is not one of {', '.join(GOODPUT_KEYS)}; write KEY:MS as in "
                                    "ttft:200")
            found[key] = _number("goodput", text, f"{word!r} needs milliseconds of at least 0 behind the colon")
            if not colon or not 0 <= found[key] < math.inf:
                raise InvalidConfig("goodput", f"{word!r} needs milliseconds of at least 0 behind the colon")
        return found

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of METRICS to show."""
        chosen = tuple(_split(self.percentile_metrics))
        for name in chosen:
            if name not in METRICS:
                raise InvalidConfig("percentile_metrics", f"{name!r} is not one of {', '.join(METRICS)}")
        return chosen

    @property
    def percentiles(self) -> tuple[float, ...]:
        found = tuple(_number("metric_percentiles", text, f"{text!r} is not a number in [0, 100]")
                      for text in _split(self.metric_percentiles))
        for value in found:
            if not 0 <= value <= 100:
                raise InvalidConfig("metric_percentiles", f"must be in [0, 100], got {value:g}")
        return found

    def _check_load(self) -> None:
        for name in ("num_prompts", "max_concurrency", "connections"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InvalidConfig(name, f"must be at least 1, got {getattr(self, name)}")
        if not self.request_rate > 0:
            raise InvalidConfig("request_rate", f"must be over 0 requests a second, got {self.request_rate:g}; inf "
                                "sends all at once")
        if not self.burstiness > 0:
            raise InvalidConfig("burstiness", f"must be over 0, got {self.burstiness:g}; 1 is a Poisson process")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise InvalidConfig("timeout", f"must be over 0 seconds and finite, got {self.timeout:g}")
        if not 0 <= self.ready_check_timeout_sec < math.inf:
            raise InvalidConfig("ready_check_timeout_sec", "must be at least 0 seconds and finite, got "
                                f"{self.ready_check_timeout_sec:g}")

    def _check_dataset(self) -> None:
        if self.dataset not in DATASETS:
            raise InvalidConfig("dataset_name", f"{self.dataset!r} is not one of {', '.join(DATASETS)}")
        if self.dataset == "random" and self.dataset_path is not None:
            raise InvalidConfig("dataset_path", "is not read with the dataset random; leave one of the two out")
        if self.dataset != "random" and self.dataset_path is None:
            raise InvalidConfig("dataset_path", f"is missing: {self.dataset} prompts are read from a file")
        if not 0 <= self.random_range_ratio < 1:
            raise InvalidConfig("random_range_ratio", f"must be in [0, 1), got {self.random_range_ratio:g}")
        for name in ("random_output_len", "output_len"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InvalidConfig(name, f"must be at least 1 token, got {getattr(self, name)}")
        shortest = self.random_prefix_len + math.floor(self.random_input_len * (1 - self.random_range_ratio))
        if shortest < 1:
            raise InvalidConfig("random_input_len", f"the shortest prompt would have {shortest} tokens; ask for more, "
                                "or for less random_range_ratio")

    def _check_server(self) -> None:
        if self.address is None and not 1 <= self.port <= 65535:
            raise InvalidConfig("port", f"must be in [1, 65535], got {self.port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise InvalidConfig(missing, "is missing; a certificate needs its key: --tls-cert and --tls-key")
        if self.metrics_url is not None and not self.metrics_url.startswith(("http://", "https://")):
            raise InvalidConfig("metrics_url", f"must begin with http:// or https://, got {self.metrics_url!r}")

    def _check_output(self) -> None:
        if self.save_detailed and self.save_result is None:
            raise InvalidConfig("save_detailed", "says what --save-result writes; name its file")
        if self.plot is not None and not self.plot.endswith(".svg"):
            raise InvalidConfig("plot", f"is written as SVG; name a file that ends with .svg, got {self.plot!r}")
        for name in ("save_result", "plot"):
            if getattr(self, name) is not None:
                _check_file(name, Path(getattr(self, name)))


def _check_file(field: str, path: Path) -> None:
    """Whether it can be written, which is known now and not behind the run. Raises InvalidConfig."""
    if path.is_dir():
        raise InvalidConfig(field, f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InvalidConfig(field, f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidConfig(field, f"{path} cannot be written by this user; name another file")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(field: str, text: str, problem: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidConfig(field, problem) from None
