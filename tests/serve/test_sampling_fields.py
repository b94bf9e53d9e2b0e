"""Token rules and constrained output over a real channel: what arrives, what is refused, and nothing else suffers."""

import asyncio
import threading
from typing import Any

import grpc
import pytest
from counting_engine import CountingEngine, make_core
from serving import Served, eventually, serving

from jaxinfer.types import SamplingParams, StructuredOutput
from serve.client import AsyncClient, request_message, structured_output_message
from serve.protos.jaxinfer.v1 import generation_pb2 as pb
from serve.served_core import INLINE_CHARS, work_size

INVALID = grpc.StatusCode.INVALID_ARGUMENT
HOSTILE = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{count}}}"} for count in range(5, 25)]}
"""A schema that would be compiled for minutes."""

FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"presence_penalty": -1.5, "frequency_penalty": 0.25, "repetition_penalty": 1.75}, {}),
    ({"logit_bias": {97: 2.5, 0: -100}}, {"logit_bias": ((0, -100.0), (97, 2.5))}),
    ({"allowed_token_ids": [98, 97, 256]}, {"allowed_token_ids": (98, 97, 256)}),
    ({"banned_token_ids": (98,)}, {"banned_token_ids": (98,)}),
    ({"bad_words": ["no", "never"]}, {"bad_words": ("no", "never")}),
    ({"bad_words": "no"}, {"bad_words": ("no",)}),
    ({"structured_outputs": {"json": {"type": "object", "required": ["z", "a"]}}},
     {"structured_outputs": StructuredOutput(json='{"type":"object","required":["z","a"]}')}),
    ({"structured_outputs": {"json": ' {"type": "null"}', "disable_any_whitespace": True}},
     {"structured_outputs": StructuredOutput(json='{"type":"null"}', disable_any_whitespace=True)}),
    ({"structured_outputs": {"json_object": True, "regex": None}},
     {"structured_outputs": StructuredOutput(json_object=True)}),
    ({"structured_outputs": {"regex": "[0-9]+"}}, {"structured_outputs": StructuredOutput(regex="[0-9]+")}),
    ({"structured_outputs": {"choice": ["yes", "no", "yes"]}},
     {"structured_outputs": StructuredOutput(choice=("yes", "no"))}),
    ({"structured_outputs": StructuredOutput(choice=["yes", "no"])},
     {"structured_outputs": StructuredOutput(choice=("yes", "no"))}),
    ({"structured_outputs": {"grammar": 'start: "a" | "b"'}},
     {"structured_outputs": StructuredOutput(grammar='start: "a" | "b"')}),
]  # fmt: skip

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"presence_penalty": 2.5}, ["presence_penalty", "[-2, 2]", "2.5"]),
    ({"frequency_penalty": float("nan")}, ["frequency_penalty", "nan"]),
    ({"repetition_penalty": 0.0}, ["repetition_penalty", "2]", "0"]),
    ({"logit_bias": {257: 1.0}}, ["logit_bias", "257", "[0, 257)"]),
    ({"logit_bias": {5: 101.0}}, ["logit_bias", "100", "101", "token 5"]),
    ({"allowed_token_ids": [-1]}, ["allowed_token_ids", "-1"]),
    ({"banned_token_ids": [300]}, ["banned_token_ids", "300"]),
    ({"bad_words": [" "]}, ["bad_words", "blank"]),
    ({"bad_words": ["x"] * 301}, ["bad_words", "301", "300"]),
    ({"bad_words": "seventeen letters"}, ["bad_words", "17 tokens", "16"]),
    ({"allowed_token_ids": [98], "banned_token_ids": [98]}, ["allowed_token_ids", "banned_token_ids"]),
    ({"structured_outputs": {}}, ["structured_outputs", "exactly one of", "none"]),
    ({"structured_outputs": {"json": "{"}}, ["structured_outputs.json", "not valid JSON"]),
    ({"structured_outputs": {"json": "[1]"}}, ["structured_outputs.json", "object"]),
    ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, ["structured_outputs.json", "unique"]),
    ({"structured_outputs": {"regex": "(a"}}, ["structured_outputs.regex", "cannot be compiled"]),
    ({"structured_outputs": {"regex": "(?=a)b"}}, ["structured_outputs.regex"]),
    ({"structured_outputs": {"choice": []}}, ["structured_outputs.choice", "at least one"]),
    ({"structured_outputs": {"grammar": "start: missing"}}, ["structured_outputs.grammar", "missing"]),
    ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
     ["structured_outputs.disable_any_whitespace", "regex"]),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, ["ignore_eos", "structured_outputs"]),
    ({"structured_outputs": {"regex": "a"}, "bad_words": ["b"]}, ["bad_words", "structured_outputs"]),
]  # fmt: skip

NEVER_SENT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"allowed_token_ids": []}, ValueError, "allowed_token_ids is empty"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, ValueError, "json and regex"),
    ({"structured_outputs": {"jsn": {}}}, TypeError, "jsn"),
    ({"structured_outputs": {"choice": "yes"}}, TypeError, "choice"),
    ({"structured_outputs": {"json": {"a": {1, 2}}}}, TypeError, "JSON"),
    ({"logit_bias": {"a": 1.0}}, TypeError, "int"),
]


@pytest.fixture(scope="module")
def idle():
    """One service whose engine never steps: it shows what has arrived."""
    with serving(make_core(CountingEngine())) as found:
        yield found


def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize(("options", "wanted"), FIELDS, ids=str)
def test_every_field_arrives(idle: Served, options: dict, wanted: dict):
    with idle.client.stream("ab", **options):
        eventually(lambda: idle.engine.rows)
        (row,) = idle.engine.rows.values()
        for name in options:
            assert getattr(row.request.params, name) == (wanted.get(name, options[name]))
        structured = row.request.params.structured_outputs
        assert (row.request.grammar is None) == (structured is None)
        assert (row.request.rules is None) == (structured is not None)
        assert structured is None or row.request.grammar.kind == structured.kind
    eventually(lambda: not idle.engine.rows)


def test_every_sampling_field_is_a_field_on_both_sides():
    names = {one.name for one in pb.StructuredOutput.DESCRIPTOR.fields}
    assert names == set(StructuredOutput.__dataclass_fields__)
    assert {one.name for one in pb.SamplingParams.DESCRIPTOR.fields} == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=str)
def test_bad_values_are_refused_by_name(served: Served, options: dict, words: list[str]):
    for call in (served.client.generate, lambda *args, **kwargs: list(served.client.stream(*args, **kwargs))):
        code, text = refusal(lambda call=call: call("ab", **options))
        assert code is INVALID
        assert all(word in text for word in words), text
    assert served.client.generate("ab", max_tokens=1).text == "c"


@pytest.mark.parametrize(("options", "error", "words"), NEVER_SENT, ids=str)
def test_what_the_wire_would_lose_is_refused_by_the_client(options: dict, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        request_message("ab", options)  # pyright: ignore[reportArgumentType]


def test_a_message_has_the_order_of_a_schemas_keys():
    sent = structured_output_message({"json": {"z": 1, "a": {"ü": None}}})
    assert sent.json == '{"z": 1, "a": {"\\u00fc": null}}'


def test_a_hostile_grammar_fails_alone_while_others_go_on():
    """The grammar is still being compiled while a stream of another client comes to its end."""
    with serving(make_core(CountingEngine(pace=0.001))) as served:
        core, compiling, let_go = served.core, threading.Event(), threading.Event()
        assert core is not None
        compile_grammar = core.intake._grammars.compile

        def slow(wanted):
            compiling.set()
            assert let_go.wait(20), "nobody was served meanwhile"
            return compile_grammar(wanted)

        core.intake._grammars.compile = slow  # type: ignore[method-assign]
        found: list[tuple[grpc.StatusCode, str]] = []
        hostile = threading.Thread(target=lambda: found.append(refusal(
            lambda: served.client.generate("ab", structured_outputs={"json": HOSTILE}))))
        hostile.start()
        assert compiling.wait(20)
        assert "".join(delta.text for delta in served.client.stream("ab", max_tokens=20)) == "cdefghijklmnopqrstuv"
        assert served.client.generate("a" * 10_000, max_tokens=1).text == "b"  # tokenised in a thread
        assert not found
        let_go.set()
        hostile.join()
        ((code, text),) = found
        assert code is INVALID and text.startswith("structured_outputs.json: ")
        assert served.client.generate("ab", max_tokens=1).text == "c"


def test_the_async_client(served: Served):
    async def use() -> None:
        async with AsyncClient(served.server.address) as client:
            rules: dict[str, Any] = {"bad_words": ["no"], "presence_penalty": 0.5, "logit_bias": {5: 1.0}}
            assert (await client.generate("ab", max_tokens=3, **rules)).text == "cde"
            # The counting engine takes no notice of the grammar.
            stream = client.stream("ab", max_tokens=3, structured_outputs={"choice": ["cde", "x"]})
            assert "".join([delta.text async for delta in stream]) == "cde"
            with pytest.raises(grpc.aio.AioRpcError, match=r"structured_outputs\.json") as caught:
                await client.generate("ab", structured_outputs={"json": "{"})
            assert caught.value.code() is INVALID
            with pytest.raises(ValueError, match="json and regex"):
                client.stream("ab", structured_outputs={"json": {}, "regex": "a"})

    asyncio.run(use())


def test_many_bad_words_are_made_tokens_in_a_thread():
    few, many = (SamplingParams(bad_words=["no"] * count) for count in (3, 300))
    assert work_size([1], few) <= INLINE_CHARS < work_size([1], many)
