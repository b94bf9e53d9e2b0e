"""Checks of constrained output: everything that can be said about a StructuredOutput without compiling it.

What passes is small: bytes, depth and counts are bounded, so that the compiler's own limits, which count steps
and not seconds, bound its time in nearly all cases. `grammar_check` sees to the others.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxinfer.errors import InvalidRequest
from jaxinfer.request_limits import DEFAULT_LIMITS, RequestLimits
from jaxinfer.types import STRUCTURED_KINDS, SamplingParams, StructuredOutput
from jaxinfer.validation import check_text, shown

FIELD = "structured_outputs"
MAX_CHOICE_BYTES = 64 * 1024
"""All choices together: they become one expression."""
MAX_DEPTH = 64
"""Objects and arrays inside one another in a schema; the compiler refuses about twice as many."""
LIBRARY_OPTIONS = "x-guidance"
"""A schema's key for options of the library; some of them make output that is no JSON or ignores the schema."""


def checked(value: Any, limits: RequestLimits = DEFAULT_LIMITS) -> StructuredOutput:
    """`value` in its one canonical, hashable form: a schema as text (order of keys kept), choices as a tuple.

    Raises InvalidRequest naming `structured_outputs` or one of its fields, and nothing else.
    """
    if not isinstance(value, StructuredOutput):
        raise InvalidRequest(FIELD, f"must be StructuredOutput, got {shown(value)}; "
                             "make it with StructuredOutput(json=...)")
    for name in ("json_object", "disable_any_whitespace"):
        if not isinstance(getattr(value, name), bool):
            raise InvalidRequest(f"{FIELD}.{name}", f"must be true or false, got {shown(getattr(value, name))}")
    given = [name for name in STRUCTURED_KINDS if not _is_unset(getattr(value, name))]
    if len(given) != 1:
        raise InvalidRequest(FIELD, f"must set exactly one of {', '.join(STRUCTURED_KINDS)}, "
                             f"got {' and '.join(given) or 'none'}")
    if value.disable_any_whitespace and given[0] not in ("json", "json_object"):
        raise InvalidRequest(f"{FIELD}.disable_any_whitespace", f"is for JSON only, not for {given[0]}; leave it out")
    if value.json is not None:
        return dataclasses.replace(value, json=canonical_schema(value.json, limits.max_schema_bytes))
    if value.choice is not None:
        return dataclasses.replace(value, choice=_checked_choice(value.choice, limits.max_choices))
    for name, limit in (("regex", limits.max_regex_bytes), ("grammar", limits.max_grammar_bytes)):
        if getattr(value, name) is not None:
            _check_source(f"{FIELD}.{name}", getattr(value, name), limit)
    return value


def canonical_schema(schema: Any, max_bytes: int = DEFAULT_LIMITS.max_schema_bytes) -> str:
    """A schema as compact JSON text, its keys in their order: that is the order in which they are generated."""
    field = f"{FIELD}.json"
    if isinstance(schema, str):
        check_text(field, schema, max_bytes=max_bytes)
        schema = _parsed(field, schema)
    if not isinstance(schema, Mapping):
        raise InvalidRequest(field, f"must be a JSON schema, an object or its text, got {shown(schema)}")
    _check_depth(field, schema, max_bytes)
    text = _dumped(field, schema)
    check_text(field, text, max_bytes=max_bytes)
    if LIBRARY_OPTIONS in schema:
        raise InvalidRequest(field, f'has the key "{LIBRARY_OPTIONS}", which is not supported; leave it out')
    return text


def _is_unset(value: Any) -> bool:
    return value is None or value is False


def _parsed(field: str, text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise InvalidRequest(field, f"is nested too deeply; the limit is {MAX_DEPTH}") from None
    except ValueError as error:
        raise InvalidRequest(field, f"is not valid JSON: {str(error)[:200]}") from None


def _dumped(field: str, schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(_plain(schema), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field, f"is not valid JSON: {str(error)[:200]}") from None


def _plain(value: Any) -> Any:
    """Mappings as dicts with their keys checked: json.dumps would turn the key 1 or None into a string."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key must be a string, got {shown(key)}")
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_depth(field: str, schema: Any, max_bytes: int) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH + 1):
        level = [item for value in level for item in _items(value)]
        if not level:
            return
        # Each item takes at least a byte of text, and an object that holds itself would never end.
        if len(level) > max_bytes:
            raise InvalidRequest(field, f"has over {max_bytes} values; the limit is {max_bytes} bytes")
    raise InvalidRequest(field, f"is nested over {MAX_DEPTH} levels; make it flatter, with $defs and $ref")


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


def _checked_choice(choice: Any, most: int) -> tuple[str, ...]:
    field = f"{FIELD}.choice"
    if not isinstance(choice, (list, tuple)) or not choice:
        raise InvalidRequest(field, f"must be a list with at least one string, got {shown(choice)}")
    if len(choice) > most:
        raise InvalidRequest(field, f"has {len(choice)} choices; the limit is {most}")
    for one in choice:
        check_text(field, one, max_bytes=MAX_CHOICE_BYTES)
        if not one:
            raise InvalidRequest(field, "holds an empty string; every choice needs a character at least")
    size = sum(len(one.encode()) for one in choice)
    if size > MAX_CHOICE_BYTES:
        raise InvalidRequest(field, f"holds {size} bytes; the limit of all choices together is {MAX_CHOICE_BYTES}")
    return tuple(dict.fromkeys(choice))


def _check_source(field: str, text: Any, limit: int) -> None:
    check_text(field, text, max_bytes=limit)
    if not text.strip():
        raise InvalidRequest(field, "is empty; leave it out, or say what the output must look like")


def check_combination(params: SamplingParams) -> None:
    """Raises InvalidRequest, naming both fields, where a grammar and another rule could leave no legal token, or where
    only one of them could be obeyed.
    """
    for name in ("allowed_token_ids", "banned_token_ids", "bad_words", "min_tokens"):
        if getattr(params, name):
            raise InvalidRequest(name, f"cannot be used with {FIELD}: together they may leave no legal token; give one "
                                 "of them")
    if params.ignore_eos:
        raise InvalidRequest("ignore_eos", f"cannot be used with {FIELD}: nothing may follow a complete output; leave "
                             "it out, and bound the length from below by what the output must look like")
