"""What a tokenizer.json may not say, because the library would end the process and not raise an error."""

from pathlib import Path
from typing import Any

from jaxinfer.errors import ModelFormatError
from jaxinfer.model_files import parse_json


def check_tokenizer(text: str, path: Path) -> None:
    """Of the text of a tokenizer.json, read from `path`. Raises ModelFormatError.

    With a `continuing_subword_prefix` tokenizers (0.23.3) cuts as many bytes from the second part of each merge without
    looking at them; where they are half a character, Rust aborts the process.
    """
    model = parse_json(text, path).get("model")
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(prefix, str) or not prefix:
        return
    merges = model.get("merges")
    for index, merge in enumerate(merges if isinstance(merges, list) else ()):
        second = second_part(merge)
        if second is not None and not second.startswith(prefix):
            raise ModelFormatError(f"{path}: model.merges[{index}] adds {second!r}, which does not begin with the "
                                   f"continuing_subword_prefix {prefix!r}; download it again")


def second_part(merge: Any) -> str | None:
    """Of a merge in either of its forms; None where it is neither, which the library refuses."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return parts[1] if isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], str) else None
