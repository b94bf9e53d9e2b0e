"""What the tests of grammars share."""

from collections.abc import Iterator

import pytest

import checkpoints.demo
from jaxinfer.grammar import Grammars
from jaxinfer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The demo's."""
    return Tokenizer.from_folder(checkpoints.demo.path("target"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Iterator[Grammars]:
    """Of a model with the demo's tokenizer, and as many ids as the test file's V says."""
    found = Grammars(tokenizer, request.module.V, [tokenizer.eos_id])
    yield found
    found.close()
