"""Constrained output checked against a model's folder, before its engine is loaded and compiled."""

from pathlib import Path

from jaxinfer import loading
from jaxinfer.grammar import Grammars
from jaxinfer.intake import GenerationDefaults
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import StructuredOutput


def check_shape(wanted: StructuredOutput, model: str, tokenizer: str | None = None) -> None:
    """Raises InvalidRequest where no engine of this model would take it, ModelFormatError for files that are amiss.

    model: a folder or a shipped model's name. tokenizer: another folder with one.
    """
    folder = loading.model_folder(model)
    source = Path(tokenizer).expanduser() if tokenizer else folder
    found = Tokenizer.from_folder(source) if tokenizer or (source / "tokenizer.json").is_file() else None
    eos_ids = GenerationDefaults.from_folder(folder).eos_token_ids
    grammars = Grammars(found, loading.read_config(folder).vocab_size, eos_ids)
    try:
        grammars.compile(wanted)
    finally:
        grammars.close()
