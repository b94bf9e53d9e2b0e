"""JSON schemas at random, for hypothesis: what constrained output must follow to the letter or refuse.

`schemas()` draws any; about one in eight has a keyword that the compiler may not know. Keywords whose meaning
llguidance departs from (counts of properties, where a key may come twice) are left out.
"""

from typing import Any

from hypothesis import strategies as st

NAMES = ["a", "b", "name", "größe", "x y", 'q"', "日本", "$id-like", ""]
PATTERNS = ["^[a-z]{2,5}$", "^(ab|cd)+$", "[0-9]", r"^\d{3}-\d{4}$", "^x", "y$", "^[^\"\\\\]*$"]
FORMATS = ["date", "uuid", "ipv4", "unknown-format"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.sampled_from([0.5, -2.25]) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES[:4]), inner, max_size=2),
    max_leaves=4)
UNSUPPORTED: list[dict[str, Any]] = [
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"maxLength": 2}},
    {"type": "array", "contains": {"type": "null"}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 5}]},
    {"$dynamicRef": "#x"},
]
REFERENCES = ["#/$defs/leaf", "#/$defs/tree"]


@st.composite
def schemas(draw: st.DrawFn, with_unsupported: bool = True) -> dict[str, Any]:
    """A whole schema; with $defs (a plain and a recursive one) where it refers to them."""
    if with_unsupported and draw(st.integers(0, 7)) == 0:
        part = draw(st.sampled_from(UNSUPPORTED))
        return draw(st.sampled_from([part, {"type": "object", "properties": {"a": part}, "required": ["a"]}]))
    schema = draw(subschemas())
    if _refers(schema):
        tree = {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
                "required": ["next"], "additionalProperties": False}
        schema = {**schema, "$defs": {"leaf": draw(scalars()), "tree": tree}}
    return schema


def subschemas() -> st.SearchStrategy[dict[str, Any]]:
    """A part of a schema."""
    leaves = scalars() | st.sampled_from(REFERENCES).map(lambda reference: {"$ref": reference})
    return st.recursive(leaves, lambda inner: arrays(inner) | objects(inner) | unions(inner), max_leaves=6)


def scalars() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of values that hold no others, and of fixed values of any kind."""
    fixed = st.one_of(VALUES.map(lambda value: {"const": value}),
                      st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}))
    plain = st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["integer", "null"]}, {"type": "string"}])
    return st.one_of(plain, fixed, numbers(), strings())


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    """Integers and numbers with bounds, or multiples."""
    kind = draw(st.sampled_from(["integer", "number"]))
    schema: dict[str, Any] = {"type": kind}
    if kind == "integer" and draw(st.booleans()):
        schema["multipleOf"] = draw(st.sampled_from([2, 5, 10]))
    low, size = draw(st.integers(-1000, 1000)), draw(st.integers(10, 500))
    for name, bound in ((("minimum", "exclusiveMinimum"), low), (("maximum", "exclusiveMaximum"), low + size)):
        if draw(st.booleans()):
            schema[draw(st.sampled_from(name))] = bound if kind == "integer" else bound + 0.5
    return schema


@st.composite
def strings(draw: st.DrawFn) -> dict[str, Any]:
    """Strings of some length, of a pattern or of a format."""
    form = draw(st.sampled_from(["length", "pattern", "format"]))
    if form == "pattern":
        return {"type": "string", "pattern": draw(st.sampled_from(PATTERNS))}
    if form == "format":
        return {"type": "string", "format": draw(st.sampled_from(FORMATS))}
    least = draw(st.integers(0, 4))
    return {"type": "string", "minLength": least, "maxLength": least + draw(st.integers(0, 8))}


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """Arrays with items, first items and a length."""
    least = draw(st.integers(0, 2))
    schema: dict[str, Any] = {"type": "array", "items": draw(inner)}
    if draw(st.booleans()):
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
    if draw(st.booleans()):
        schema |= {"minItems": least, "maxItems": least + draw(st.integers(0, 3))}
    return schema


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """Objects with properties, some of them required, and rules for others."""
    properties = draw(st.dictionaries(st.sampled_from(NAMES), inner, max_size=4))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if properties:
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    others = draw(st.sampled_from(["open", "closed", "typed"]))
    if others != "open":
        schema["additionalProperties"] = False if others == "closed" else draw(inner)
    return schema


def unions(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of some, or all of two where the second only adds to objects."""
    any_of = st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
    more = {"type": "object", "properties": {"more": {"type": "integer"}}, "required": ["more"]}
    return any_of | objects(inner).map(lambda part: {"allOf": [{**part, "additionalProperties": True}, more]})


def _refers(schema: Any) -> bool:
    if isinstance(schema, dict):
        return "$ref" in schema or any(map(_refers, schema.values()))
    return isinstance(schema, list) and any(map(_refers, schema))
