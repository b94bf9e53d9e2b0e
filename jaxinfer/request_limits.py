"""What one request may ask for, whoever sends it: the limits that an operator may move.

Those that follow from the model (lengths, ids), from compiled programs (stop ids) or from the meaning of a field
(temperature) are no choice, and stand in `validation`.
"""

import math
from dataclasses import dataclass

from jaxinfer.errors import InvalidConfig
from jaxinfer.types import MAX_BAD_WORDS, MAX_LOGPROBS

KIB = 1024
RANGES: dict[str, tuple[int, int]] = {
    "max_n": (1, 1024), "max_stops": (0, 1024), "max_stop_bytes": (1, 64 * KIB), "max_logprobs": (0, MAX_LOGPROBS),
    "max_logit_bias": (0, 64 * KIB), "max_bad_words": (0, MAX_BAD_WORDS), "max_schema_bytes": (1, 1024 * KIB),
    "max_grammar_bytes": (1, 1024 * KIB), "max_regex_bytes": (1, 1024 * KIB), "max_choices": (1, 64 * KIB),
    "max_template_bytes": (1, 64 * 1024 * KIB),
}
"""Inclusive. Log-probabilities and bad words have places in compiled programs; a rendered chat must fit the memory of
the process that renders it.
"""
MOST_SECONDS = 20.0
"""Less than a request waits for its grammar at most (`grammar.MAX_WAIT_SECONDS`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Wrong values raise InvalidConfig.

    max_n: samples. max_stops, max_stop_bytes: stop strings, and bytes of each: it is searched for every generated
    character, so its length bounds the text held back. max_logprobs: of output and prompt, at each position.
    max_logit_bias: ids, each looked at in Python; whoever needs more wants allowed_token_ids or banned_token_ids.
    max_bad_words: words. max_schema_bytes: of canonical JSON text: time to compile and memory grow with it, and schemas
    in the wild are mostly under 10 kB. max_grammar_bytes: one of a programming language takes 10 to 40 kB.
    max_regex_bytes, max_choices: of the other kinds of constrained output. grammar_seconds: what compiling any of them
    may take. template_seconds, max_template_bytes: what rendering a chat may take and write.
    """

    max_n: int = 16
    max_stops: int = 16
    max_stop_bytes: int = 256
    max_logprobs: int = MAX_LOGPROBS
    max_logit_bias: int = 300
    max_bad_words: int = MAX_BAD_WORDS
    max_schema_bytes: int = 64 * KIB
    max_grammar_bytes: int = 64 * KIB
    max_regex_bytes: int = 16 * KIB
    max_choices: int = 1024
    grammar_seconds: float = 2.0
    template_seconds: float = 2.0
    max_template_bytes: int = 16 * 1024 * KIB

    def __post_init__(self):
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InvalidConfig(name, f"must be an integer in [{least}, {most}], got {value!r}")
        for name in ("grammar_seconds", "template_seconds"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value <= MOST_SECONDS:
                raise InvalidConfig(name, f"must be over 0 and at most {MOST_SECONDS:g}, got {value!r}")


DEFAULT_LIMITS = RequestLimits()
