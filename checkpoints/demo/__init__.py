"""A pair of tiny Llama checkpoints trained on Python's own standard library: a target and its draft."""

from pathlib import Path

__all__ = ["path"]


def path(name: str) -> Path:
    """Return the folder of the checkpoint called `name`, which is "target" or "draft"."""
    if name not in ("target", "draft"):
        raise ValueError(f"unknown demo checkpoint {name!r}: expected 'target' or 'draft'")
    return Path(__file__).parent / name
