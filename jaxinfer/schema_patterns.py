"""Patterns of a JSON schema, narrowed where llguidance would let too much pass.

A pattern speaks of characters, the output of their JSON escapes. llguidance (1.9) takes a class that holds all
control characters for one that may be escaped in every way: `[^"]` then takes the two characters `\\"`, whose
meaning is the excluded quote. A class without U+0000 is translated character by character, so every negated class
loses it. What is said then still satisfies the schema. Not narrowed: classes that list all control characters one by
one or as a range, and set operations inside classes.
"""

from typing import Any

MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose keys are names and whose values are schemas."""
DATA = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas, whatever they look like."""


def narrowed(schema: Any) -> Any:
    """The schema with its patterns narrowed, those of property names too."""
    if isinstance(schema, list):
        return [narrowed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _narrowed_value(key, value) for key, value in schema.items()}


def _narrowed_value(key: str, value: Any) -> Any:
    if key in DATA:
        return value
    if key == "pattern" and isinstance(value, str):
        return narrowed_pattern(value)
    if key in MAPS_OF_SCHEMAS and isinstance(value, dict):
        return {narrowed_pattern(name) if key == "patternProperties" else name: narrowed(item)
                for name, item in value.items()}
    return narrowed(value)


def narrowed_pattern(pattern: str) -> str:
    """The pattern whose negated classes leave out U+0000 as well."""
    found, i = [], 0
    while i < len(pattern):
        size = 2 if pattern[i] == "\\" or pattern.startswith("[^", i) else 1
        part = pattern[i : i + size]
        i += size
        # A bracket right behind is an ordinary character of the class only there.
        found.append(part + r"\x00" if part == "[^" and not pattern.startswith("]", i) else part)
    return "".join(found)
