"""The one tree of errors, and the one table from it to gRPC status and HTTP code.

Every message says what was wrong, the limit, the value given and what to do. Only the message of a
`JaxInferError` may reach a client; anything else is reported as an internal error without its text.
"""

from dataclasses import dataclass


class JaxInferError(Exception):
    """Base of everything this project raises on purpose."""


class InvalidRequest(JaxInferError, ValueError):
    """A field of one request is out of its limits; `field` names it."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field


class GrammarFailed(InvalidRequest):
    """The grammar of a row broke a limit while the row was generated; this row cannot go on, others can."""


class InvalidConfig(JaxInferError, ValueError):
    """An engine, model or mesh setting cannot work; `field` names it."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field


class ModelFormatError(JaxInferError, ValueError):
    """A checkpoint, config or tokenizer file is missing, malformed or does not fit the model."""


class TokenizerMissing(JaxInferError):
    """Text was given or asked for, but the model folder has no tokenizer."""


class OutOfMemory(JaxInferError):
    """Weights, pages and temporaries do not fit in the device's memory."""


class CompileFailed(JaxInferError):
    """The device's compiler refused one of the engine's programs."""


class Overloaded(JaxInferError):
    """The queue of waiting requests is full; try again later."""


class EngineClosed(JaxInferError):
    """The engine is shutting down or gone."""


class StepFailed(JaxInferError):
    """The device step failed repeatedly; the request could not be finished."""


class RowFailed(JaxInferError):
    """A defect that showed in one sample, which ends alone."""


class NumericFailure(RowFailed):
    """The model computed NaN or infinity for one sample."""


class DeliveryFailed(JaxInferError):
    """The service was too far behind its engine to take a request's tokens; the request was dropped."""


@dataclass(frozen=True, slots=True)
class StatusRow:
    """How one kind of error looks from outside: gRPC status name and HTTP code."""

    error: type[Exception]
    grpc: str
    http: int


STATUS_TABLE: tuple[StatusRow, ...] = (
    StatusRow(InvalidRequest, "INVALID_ARGUMENT", 400),
    StatusRow(TokenizerMissing, "FAILED_PRECONDITION", 400),
    StatusRow(InvalidConfig, "FAILED_PRECONDITION", 400),
    StatusRow(ModelFormatError, "FAILED_PRECONDITION", 400),
    StatusRow(CompileFailed, "FAILED_PRECONDITION", 400),
    StatusRow(Overloaded, "RESOURCE_EXHAUSTED", 429),
    StatusRow(OutOfMemory, "RESOURCE_EXHAUSTED", 429),
    StatusRow(EngineClosed, "UNAVAILABLE", 503),
    StatusRow(StepFailed, "UNAVAILABLE", 503),
    StatusRow(NumericFailure, "DATA_LOSS", 500),
    StatusRow(RowFailed, "INTERNAL", 500),
    StatusRow(DeliveryFailed, "UNAVAILABLE", 503),
)


def status_of(error: BaseException) -> tuple[str, int, str]:
    """The gRPC status name, the HTTP code and the text a client may see for `error`."""
    for row in STATUS_TABLE:
        if isinstance(error, row.error):
            return row.grpc, row.http, str(error)
    return "INTERNAL", 500, "internal error; the server's log has the details"
