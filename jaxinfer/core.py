"""What every front needs of a running model: the intake, the tokenizer and the engine's thread.

`serve`, the offline API and batch jobs all hold one `Core`; nothing else of the engine is theirs to touch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jaxinfer.types import Request, TokenChunk

if TYPE_CHECKING:
    from jaxinfer.intake import Intake
    from jaxinfer.tokenizer import Tokenizer


class Consumer(Protocol):
    """Receives a request's chunks, on the engine thread: it must only hand them on, quickly."""

    def deliver(self, chunks: list[TokenChunk]) -> None:
        """All chunks of one step for this consumer, in order."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of the served model that a client may ask for."""

    name: str
    family: str
    vocab_size: int
    max_model_len: int
    dtype: str
    num_parameters: int
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is. Pages are counts; waiting_tokens are prompt tokens not yet computed."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    pages_used: int
    pages_cached: int
    pages_total: int


class EngineHandle(Protocol):
    """The thread-safe face of the engine (`engine_thread.EngineThread`; tests have fakes of it)."""

    def submit(self, request: Request, consumer: Consumer) -> None:
        """Queue a request. Raises Overloaded or EngineClosed; the rest reaches the consumer as chunks."""
        ...

    def check_room(self, num_samples: int) -> None:
        """Raises what `submit` would raise for a request of so many samples, however short."""
        ...

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or the one sample in whose text a stop string came, within one step. No chunk follows;
        unknown ids are ignored.
        """
        ...

    @property
    def alive(self) -> bool:
        """Whether the engine still runs; once it is not, every request is refused with EngineClosed."""
        ...

    def progress(self) -> int | None:
        """A number that changes whenever a step has brought something; None while there is nothing to do."""
        ...

    def load(self) -> Load: ...

    def metrics(self) -> dict[str, Any]:
        """A snapshot of all counters, plain data."""
        ...

    def run(self, work: Callable[[Any], Any]) -> Any:
        """Call `work(engine)` on the engine thread between steps and return its result."""
        ...

    def close(self, drain_seconds: float = 0.0) -> None:
        """Stop taking requests, finish the running ones for at most `drain_seconds`, then stop."""
        ...


@dataclass(frozen=True, slots=True)
class Core:
    """One served model."""

    info: ModelInfo
    intake: "Intake"
    tokenizer: "Tokenizer | None"
    engine: EngineHandle
