"""Text and JSON files of a model folder, read without trusting them; every error names the file."""

import json
from pathlib import Path
from typing import Any

from jaxinfer.errors import ModelFormatError

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Largest file read; the largest known tokenizers (256k entries) are about 35 MB."""


def read_text(path: Path) -> str:
    """The text of a file. Raises ModelFormatError when it cannot be read, is too large or is not UTF-8."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ModelFormatError(f"{path}: is {size} bytes; the limit is {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}; download it again"
                               ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} when there is no such file. Raises ModelFormatError."""
    return parse_json(read_text(path), path) if path.is_file() else {}


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, read from `path`. Raises ModelFormatError, with line and column of bad syntax."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: is not valid JSON: {error}; repair it or download it again") from error
    if not isinstance(found, dict):
        raise ModelFormatError(f"{path}: must hold a JSON object, it holds a {type(found).__name__}")
    return found
