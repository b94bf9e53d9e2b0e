"""Which model is compiled for which devices, and where it cannot fit."""

from dataclasses import dataclass
from typing import Any

ROWS = 32
"""Of the calls of decode and verification that are compiled."""
DRAFTED = 4
"""Drafted tokens a row of a verification step: it has one query more."""


@dataclass(frozen=True)
class Case:
    """A model on a target of `pallas_kernels.aot.targets`. quantization: as `LLM` takes it.

    fits: False where the weights alone are more than the memory, so that the plan must refuse.
    """

    model: str
    target: str
    quantization: str | None = None
    fits: bool = True

    @property
    def name(self) -> str:
        """As `make aot ARGS=...` takes it: "8b-bf16-v6e:1"."""
        return f"{self.model}-{self.quantization or 'bf16'}-{self.target}"

    def arguments(self) -> dict[str, Any]:
        return {"model": self.model, "target_name": self.target, "quantization": self.quantization}


CASES = (
    *(Case("8b", target) for target in ("v6e:1", "v5p:1", "tpu7x:1", "h200:1", "v5e:4")),
    Case("8b", "v5e:1", "int8"),
    *(Case("70b", target) for target in ("v6e:8", "v5p:4")),
    *(Case("70b", target, "int8") for target in ("v5e:8", "h200:1")),
    Case("8b", "v5e:1", fits=False),
    *(Case("70b", target, fits=False) for target in ("v5e:8", "v6e:1", "v5p:1", "tpu7x:1", "h200:1")),
    *(Case("70b", target, "int8", fits=False) for target in ("v5e:4", "v6e:1")),
)
