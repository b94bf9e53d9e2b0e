"""A pure-JAX inference stack for large language models.

    from jaxinfer import LLM, SamplingParams

    with LLM("demo") as llm:
        print(llm.generate("def main(", SamplingParams(max_tokens=32))[0].outputs[0].text)

Importing this module imports neither jax nor numpy; the first use of a name imports what that name needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.errors import (
        CompileFailed,
        EngineClosed,
        InvalidConfig,
        InvalidRequest,
        JaxInferError,
        ModelFormatError,
        NumericFailure,
        OutOfMemory,
        Overloaded,
        StepFailed,
        TokenizerMissing,
    )
    from jaxinfer.offline import LLM
    from jaxinfer.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxinfer.types import SamplingParams, StructuredOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompileFailed",
    "CompletionOutput",
    "EngineClosed",
    "InvalidConfig",
    "InvalidRequest",
    "JaxInferError",
    "Logprob",
    "ModelFormatError",
    "NumericFailure",
    "OutOfMemory",
    "Overloaded",
    "RequestOutput",
    "SamplingParams",
    "StepFailed",
    "StructuredOutput",
    "TokenizerMissing",
    "__version__",
]

_HOME = {
    "LLM": "offline",
    "SamplingParams": "types",
    "StructuredOutput": "types",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
}
"""Module of each public name; the rest are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "LLM":
        from jaxinfer import shadowing

        shadowing.check("checkpoints", "pallas_kernels")
        shadowing.warn("serve")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
