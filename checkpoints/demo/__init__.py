"""Tiny Llama checkpoints trained on Python's own standard library: a target, its draft, and heads of the target."""

from pathlib import Path

__all__ = ["path"]

NAMES = ("target", "draft", "medusa")


def path(name: str) -> Path:
    """Return the folder of the checkpoint called `name`: "target", "draft", or "medusa" for the target's heads."""
    if name not in NAMES:
        raise ValueError(f"unknown demo checkpoint {name!r}: expected one of {', '.join(NAMES)}")
    return Path(__file__).parent / name
