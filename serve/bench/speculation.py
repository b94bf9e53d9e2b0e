"""What a server's metrics say of speculation, before and after a run."""

import re
import ssl
import urllib.request
from dataclasses import dataclass, field
from typing import Any, Self

from jaxinfer.errors import InvalidConfig

LINE = re.compile(r"^jaxinfer_(draft_tokens_total|accepted_tokens_total|draft_rounds_total)"
                  r"(?:\{accepted=\"(\d+)\"\})? (\S+)$", re.MULTILINE)
ANSWER_SECONDS = 10.0


@dataclass(slots=True)
class Drafted:
    """Counts since the server's start. rounds: with proposals of a row, by how many it kept."""

    proposed: int = 0
    accepted: int = 0
    rounds: dict[int, int] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> Self:
        """text: Prometheus' format."""
        found = cls()
        for name, kept, value in LINE.findall(text):
            if name == "draft_rounds_total":
                found.rounds[int(kept)] = int(float(value))
            elif name == "draft_tokens_total":
                found.proposed = int(float(value))
            else:
                found.accepted = int(float(value))
        return found


def fetch(url: str, ca: str | None) -> Drafted:
    """Raises InvalidConfig where nothing of that kind is found."""
    context = ssl.create_default_context(cafile=ca) if url.startswith("https:") else None
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS, context=context) as answer:  # noqa: S310 - checked
            text = answer.read().decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        raise InvalidConfig("metrics_url", f"{url} cannot be read: {error}; start the server with "
                            "--metrics-port") from None
    if "jaxinfer_" not in text:
        raise InvalidConfig("metrics_url", f"{url} has no metrics of jaxinfer serve")
    return Drafted.read(text)


def speculated(before: Drafted, after: Drafted) -> dict[str, Any]:
    """The difference under vLLM's names; {} where nothing was proposed. Rate in percent, length in tokens a round."""
    proposed, accepted = after.proposed - before.proposed, after.accepted - before.accepted
    rounds = {kept: times - before.rounds.get(kept, 0) for kept, times in after.rounds.items()}
    drafts = sum(rounds.values())
    if not proposed or not drafts:
        return {}
    places = range(max(kept for kept, times in rounds.items() if times))
    return {
        "spec_decode_acceptance_rate": 100 * accepted / proposed,
        "spec_decode_acceptance_length": 1 + accepted / drafts,
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": proposed,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_per_position_acceptance_rates": [
            # A round that kept k proposals kept those at the places 0 to k - 1.
            sum(times for kept, times in rounds.items() if kept > place) / drafts for place in places],
    }
