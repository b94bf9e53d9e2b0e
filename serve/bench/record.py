"""What was seen of one request. Times are seconds from the start of the run, on this machine's clock."""

from dataclasses import dataclass, field

OK = "OK"


@dataclass(slots=True)
class Record:
    """due: when it was to be sent: its scheduled arrival, or, where there is no schedule, when its turn came. handed:
    when the generator got to it. sent: when the call was made, after it waited for `max_concurrency`. ended: the last
    message, or the error.

    times, counts: of each message that brought tokens, when and how many. status: of gRPC, by name; "ABORTED" also
    where the server ended an output early. server_ttft, server_queue: what the server says of the same request.
    """

    due: float
    handed: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    status: str = "UNKNOWN"
    error: str = ""
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    server_ttft: float | None = None
    server_queue: float | None = None
    text: str = ""

    @property
    def completed(self) -> bool:
        return self.status == OK

    @property
    def ttft(self) -> float:
        """Due to the first token; 0 without any."""
        return self.times[0] - self.due if self.times else 0.0

    @property
    def e2el(self) -> float:
        """Due to the end."""
        return self.ended - self.due

    @property
    def tpot(self) -> float | None:
        """Mean time a token behind the first; None of outputs of one token."""
        return (self.ended - self.times[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        """Times between messages that bring tokens, however many each brings."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]

    @property
    def lag(self) -> float:
        """How late the generator was."""
        return self.handed - self.due

    @property
    def client_queue_time(self) -> float:
        """Due to sent."""
        return self.sent - self.due
