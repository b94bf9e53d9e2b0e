"""What a request for constrained output may hold, before anything is compiled."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import InvalidRequest
from jaxinfer.request_limits import DEFAULT_LIMITS as LIMITS
from jaxinfer.structured_output import MAX_CHOICE_BYTES, MAX_DEPTH, checked
from jaxinfer.types import StructuredOutput


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


HOLDS_ITSELF: dict = {}
HOLDS_ITSELF["items"] = HOLDS_ITSELF
WIDE: dict = {"anyOf": [{}] * 40}
for _ in range(40):
    WIDE = {"anyOf": [WIDE] * 40}
BAD = {
    "not ours": ({"json": {}}, "structured_outputs"),
    "none": (StructuredOutput(), "structured_outputs"),
    "two": (StructuredOutput(json={}, regex="a"), "structured_outputs"),
    "two, one empty": (StructuredOutput(regex="", json_object=True), "structured_outputs"),
    "json_object a string": (StructuredOutput(json_object="yes"), "structured_outputs.json_object"),  # type: ignore
    "space, regex": (StructuredOutput(regex="a", disable_any_whitespace=True),
                     "structured_outputs.disable_any_whitespace"),
    "schema a list": (StructuredOutput(json="[]"), "structured_outputs.json"),
    "schema a number": (StructuredOutput(json=3), "structured_outputs.json"),  # type: ignore
    "schema true": (StructuredOutput(json=True), "structured_outputs.json"),  # type: ignore
    "no JSON": (StructuredOutput(json="{"), "structured_outputs.json"),
    "NaN text": (StructuredOutput(json='{"const": NaN}'), "structured_outputs.json"),
    "NaN": (StructuredOutput(json={"const": float("nan")}), "structured_outputs.json"),
    "huge int text": (StructuredOutput(json='{"const": 1' + "0" * 5000 + "}"), "structured_outputs.json"),
    "huge int": (StructuredOutput(json={"const": 10**5000}), "structured_outputs.json"),
    "a set": (StructuredOutput(json={"enum": {1}}), "structured_outputs.json"),
    "int key": (StructuredOutput(json={"properties": {1: {}}}), "structured_outputs.json"),  # type: ignore
    "surrogate": (StructuredOutput(json={"const": "\ud800"}), "structured_outputs.json"),
    "surrogate text": (StructuredOutput(json=r'{"const": "\ud800"}'), "structured_outputs.json"),
    "deep": (StructuredOutput(json=nested(MAX_DEPTH + 1)), "structured_outputs.json"),
    "deep text": (StructuredOutput(json="[" * 60_000 + "]" * 60_000), "structured_outputs.json"),
    "deep text, small": (StructuredOutput(json='{"a":' + "[" * 30_000 + "]" * 30_000 + "}"), "structured_outputs.json"),
    "holds itself": (StructuredOutput(json=HOLDS_ITSELF), "structured_outputs.json"),
    "wide": (StructuredOutput(json=WIDE), "structured_outputs.json"),
    "big": (StructuredOutput(json={"const": "x" * LIMITS.max_schema_bytes}), "structured_outputs.json"),
    "library options": (StructuredOutput(json={"x-guidance": {"lenient": True}}), "structured_outputs.json"),
    "regex bytes": (StructuredOutput(regex=b"a"), "structured_outputs.regex"),  # type: ignore
    "regex empty": (StructuredOutput(regex=""), "structured_outputs.regex"),
    "regex long": (StructuredOutput(regex="é" * (LIMITS.max_regex_bytes // 2 + 1)), "structured_outputs.regex"),
    "grammar empty": (StructuredOutput(grammar=" \n"), "structured_outputs.grammar"),
    "grammar long": (StructuredOutput(grammar="x" * (LIMITS.max_grammar_bytes + 1)), "structured_outputs.grammar"),
    "choice a string": (StructuredOutput(choice="yes"), "structured_outputs.choice"),  # type: ignore
    "choice empty": (StructuredOutput(choice=[]), "structured_outputs.choice"),
    "choice of nothing": (StructuredOutput(choice=["a", ""]), "structured_outputs.choice"),
    "choice of numbers": (StructuredOutput(choice=[1]), "structured_outputs.choice"),  # type: ignore
    "choices many": (StructuredOutput(choice=["a"] * (LIMITS.max_choices + 1)), "structured_outputs.choice"),
    "choices long": (StructuredOutput(choice=["a" * (MAX_CHOICE_BYTES // 2), "b" * (MAX_CHOICE_BYTES // 2 + 1)]),
                     "structured_outputs.choice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ones_are_refused_by_name(name):
    value, field = BAD[name]
    with pytest.raises(InvalidRequest) as caught:
        checked(value)
    assert caught.value.field == field


@pytest.mark.parametrize("good", [
    StructuredOutput(json={}), StructuredOutput(json=nested(MAX_DEPTH - 1)), StructuredOutput(json_object=True),
    StructuredOutput(json_object=True, disable_any_whitespace=True),
    StructuredOutput(regex="a" * LIMITS.max_regex_bytes), StructuredOutput(choice=["x"] * LIMITS.max_choices),
    StructuredOutput(grammar="start: /a/"),
    StructuredOutput(json={"const": "x" * (LIMITS.max_schema_bytes - len('{"const":""}'))}),
], ids=lambda good: f"{good.kind} {len(str(good))}")  # fmt: skip
def test_good_ones_pass_up_to_the_limits(good):
    found = checked(good)
    assert found.kind == good.kind
    assert checked(found) == found
    hash(found)


def test_a_schema_is_the_same_as_text_and_as_object_but_for_its_order():
    schema = {"type": "object", "properties": {"b": {"enum": [1, "é"]}, "a": {}}}
    forms = [schema, json.dumps(schema), json.dumps(schema, indent=2, ensure_ascii=False)]
    assert len({checked(StructuredOutput(json=form)) for form in forms}) == 1
    turned = {"type": "object", "properties": {"a": {}, "b": {"enum": [1, "é"]}}}
    assert checked(StructuredOutput(json=turned)) != checked(StructuredOutput(json=schema))
    assert json.loads(checked(StructuredOutput(json=schema)).json) == schema  # type: ignore[arg-type]


def test_choices_are_a_tuple_without_repeats():
    assert checked(StructuredOutput(choice=["b", "a", "b"])).choice == ("b", "a")


@given(st.builds(StructuredOutput, json=st.none() | st.from_type(object), regex=st.none() | st.text() | st.integers(),
                 choice=st.none() | st.lists(st.text() | st.none()) | st.integers(),
                 grammar=st.none() | st.binary() | st.text()))
def test_whatever_comes_is_checked_or_refused(value):
    with contextlib.suppress(InvalidRequest):
        hash(checked(value))
