"""Patterns of schemas: what `re` says of a string holds for its JSON escapes too."""

import json
import re

import pytest

import checkpoints.demo
from jaxinfer.grammar import Grammars
from jaxinfer.schema_patterns import narrowed
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import StructuredOutput

EXCLUDING = ['^[^"\\\\]*$', "^[^\\\\]*$", '^[^"]*$', "^[^a\\\\]{0,9}$", "^(a|[^\\x5c])*$", "^[^x]*$", '[^"]{2}',
             "^[^\\]]*$", '^[^\\u0022]+$', '^[^\\n"]*$', "^[^]a]*$", "^\\\\[^a]$", "^\\[\\^\"]$", "\\D"]
VALUES = ["a", "\\", "\\x", 'a"b', '"', "x", "\n", "ab", "]", "^", '["', "[^", "", "\t", "aé"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(checkpoints.demo.path("target"))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    found = Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])
    yield found
    found.close()


@pytest.mark.parametrize("pattern", EXCLUDING)
def test_strings_match_their_pattern_however_they_are_escaped(grammars, tokenizer, pattern):
    """No string that `re` refuses is legal, not as its escapes either; and one that it takes is."""
    compiled = grammars.compile(StructuredOutput(json={"type": "string", "pattern": pattern}))
    names = {"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False}
    named = grammars.compile(StructuredOutput(json=names))
    for value in VALUES:
        text = json.dumps(value, ensure_ascii=False)
        matches = re.search(pattern.replace("$", r"\Z"), value) is not None
        assert is_output(compiled, tokenizer, text) == matches
        assert is_output(named, tokenizer, f"{{{text}:1}}") == matches


def is_output(compiled, tokenizer, text):
    one, tokens = compiled.matcher(), tokenizer.encode(text, add_special_tokens=False)
    if one.valid_prefix(tokens) < len(tokens):
        return False
    one.advance(tokens)
    return one.is_complete


def test_only_patterns_are_narrowed():
    data = {"const": {"pattern": "[^a]"}, "enum": ["[^a]"], "properties": {"pattern": {"pattern": "[^a]"}}}
    wanted = {**data, "properties": {"pattern": {"pattern": r"[^\x00a]"}}}
    assert narrowed({"anyOf": [data]}) == {"anyOf": [wanted]}
