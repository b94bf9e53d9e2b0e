"""What is known of a request for tokens once its call has ended: for its line in the log, for its spans."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from serve.generation import Generation


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """method: "package.Service/Method". request_id: the client's, "" if it has none. code: the name of the gRPC status.
    field_refused: the one that was out of its limits; None where it was not that.

    began: time.monotonic() of the call's start. metadata: the client's, its token included. generation: None if the
    request was refused before it could be read.
    """

    method: str
    request_id: str
    tenant: str
    code: str
    field_refused: str | None
    began: float
    metadata: Iterable[tuple[str, Any]] = field(repr=False)
    generation: Generation | None

    @property
    def id(self) -> str:
        """The client's id, or the one that it got."""
        return self.request_id if self.generation is None else self.generation.request.id

    def finish(self) -> Counter[str]:
        """Samples by the reason of their end; those that an answered call left unfinished were aborted."""
        if self.generation is None:
            return Counter()
        found = Counter(self.generation.finish_reasons)
        if self.code == "OK" and not self.generation.finished:
            found["abort"] = self.generation.request.params.n - found.total()
        return found


Observer = Callable[[EndedRequest], None]
"""Is told of every request that ends, on the event loop: it must be quick."""
