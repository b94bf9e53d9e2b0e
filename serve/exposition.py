"""Metrics as Prometheus reads them: its text format, version 0.0.4."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all its series. samples: end of the name, labels, value."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, Mapping[str, str], float]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, kind: str, help: str, value: float, labels: Mapping[str, str]) -> Self:
        """A gauge or counter of one series."""
        return cls(name, kind, help, [("", labels, value)])

    @classmethod
    def by(cls, name: str, kind: str, help: str, label: str, values: Mapping[Any, float], labels: Mapping[str, str]
           ) -> Self:  # fmt: skip
        """One with a series for each value of `label`."""
        return cls(name, kind, help, [("", {**labels, label: str(key)}, value) for key, value in values.items()])

    @classmethod
    def histogram(cls, name: str, help: str, snapshot: Mapping[str, Any], labels: Mapping[str, str]) -> Self:
        """snapshot: as `jaxinfer.metrics.Histogram` gives it."""
        edges = [*((format(edge, ".10g"), count) for edge, count in snapshot["buckets"]), ("+Inf", snapshot["count"])]
        samples = [("_bucket", {**labels, "le": edge}, count) for edge, count in edges]
        return cls(name, "histogram", help,
                   [*samples, ("_sum", labels, snapshot["sum"]), ("_count", labels, snapshot["count"])])


def text_of(families: Iterable[Family]) -> str:
    """All families, each ended by a newline."""
    lines: list[str] = []
    for family in families:
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        lines += [f"{family.name}{end}{labels_text(labels)} {value!r}" for end, labels, value in family.samples]
    return "\n".join(lines) + "\n"


def labels_text(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value.translate(ESCAPES)}"' for name, value in labels.items()) + "}"
