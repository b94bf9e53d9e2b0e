"""Requests that no honest client sends, as (path, bytes): made from the descriptors of the services, so that a field
that is added is covered.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from smg_grpc_proto.generated import vllm_engine_pb2

from jaxinfer.protos.v1 import draft_pb2
from serve.protos.jaxinfer.v1 import generation_pb2

Case = tuple[str, bytes]

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"],
    draft_pb2.DESCRIPTOR.services_by_name["DraftService"],
)
VALID = {
    "jaxinfer.v1.GenerateRequest": {"text": "def f", "sampling": {"max_tokens": 2}},
    "jaxinfer.v1.TokenizeRequest": {"text": "def f"},
    "jaxinfer.v1.DetokenizeRequest": {"token_ids": [1, 2]},
    "vllm.grpc.engine.GenerateRequest": {"text": "def f", "sampling_params": {"max_tokens": 2}, "stream": True},
    "vllm.grpc.engine.AbortRequest": {"request_ids": ["x"]},
}
"""Other messages begin empty."""

INTEGERS = (0, 1, -1, 2, 16, 17, 20, 21, 255, 256, 257, 4096, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1,
            -(2**63), 2**64 - 1)
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
FLOATS = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-38, -1.0, 1.0, 1.0001, 2.0, 2.0001, -2.0001, 3e38)
NO_TEXT = "BAD-UTF-8-HERE"
"""Replaced in the bytes by what is no UTF-8: no Python string can hold it."""
NO_UTF8 = (b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82")  # the second: a lone surrogate
TEXTS = ("", "\0", " ", "a", "a" * 257, "\u00e9" * 200, "\u202e\ufeff", "\U0010ffff" * 50, "x" * 5000, "x" * 70_000,
         '{"a": NaN}', "[" * 3000, "\ud7ff\ue000", NO_TEXT, "x" + NO_TEXT)
TIMES = (1, 17, 301)
"""How often a repeated field has the value, if it is short."""


def patterns(number: int) -> Iterator[tuple[str, str]]:
    """Kind and text of grammars that are hard to compile or to walk; `number` makes them new ones."""
    deep: dict[str, Any] = {"const": number}
    for _ in range(300):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    wide = {"enum": [f"{number}-{index}" for index in range(4000)]}
    knot = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"const": number}]}}, "$ref": "#/$defs/a"}
    for schema in (deep, wide, knot, {"$ref": f"http://127.0.0.1:{number % 60000 + 1}/x"}, {"type": [number]}):
        yield "json", json.dumps(schema)
    yield from (("regex", f"{number}{text}") for text in (
        "((a{1,99}){1,99}){1,99}", "(a|a)*(a|a)*b", "(a*)*c", "[" * 200, "a{0,99999}", "(?=a)b", r"(a)\1", "a" * 9000))
    yield from (("grammar", text) for text in (
        f'start: start "{number}" | "a"', f"start: {'(' * 2000}", 'start: a\na: b\nb: a', f'start: "{number}"*',
        "start: " + " | ".join(f'"{number}{index}"' for index in range(2000))))


def with_pattern(number: int, kind: str, text: str) -> Case:
    """A request that has this grammar, to one of the services."""
    if number % 2:
        fields: dict[str, Any] = {"text": "a", "sampling": {"max_tokens": 8, "structured_outputs": {kind: text}}}
        return "/jaxinfer.v1.GenerationService/Generate", generation_pb2.GenerateRequest(**fields).SerializeToString()
    name = {"json": "json_schema"}.get(kind, kind)
    asked = vllm_engine_pb2.GenerateRequest(text="a", sampling_params={"max_tokens": 8, name: text})
    return "/vllm.grpc.engine.VllmEngine/Generate", asked.SerializeToString()


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def valid(descriptor: Descriptor) -> Message:
    return message_factory.GetMessageClass(descriptor)(**VALID.get(descriptor.full_name, {}))


Change = Callable[[Message], None]


def changes(descriptor: Descriptor, depth: int = 0) -> Iterator[Change]:
    """Each field of a message, and of the messages in it, at each of its edges."""
    for field in descriptor.fields:
        if field.message_type is not None and not is_map(field):
            if depth < 4:
                yield from (nested(field, change) for change in changes(field.message_type, depth + 1))
            continue
        yield from (setting(field, value, times) for value in edges(value_field(field))
                    for times in (TIMES if field.is_repeated and len(str(value)) < 300 else TIMES[:1]))


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def value_field(field: FieldDescriptor) -> FieldDescriptor:
    return field.message_type.fields_by_name["value"] if is_map(field) else field


def edges(field: FieldDescriptor) -> tuple[Any, ...]:
    if field.cpp_type in RANGES:
        low, high = RANGES[field.cpp_type]
        return tuple(value for value in INTEGERS if low <= value <= high)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return FLOATS
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return (False, True)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return (b"", b"\xff" * 300)
    return TEXTS if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else ()


def nested(field: FieldDescriptor, change: Change) -> Change:
    def apply(message: Message) -> None:
        inner = getattr(message, field.name)
        change(inner.add() if field.is_repeated else inner)

    return apply


def setting(field: FieldDescriptor, value: Any, times: int) -> Change:
    def apply(message: Message) -> None:
        if is_map(field):
            for key in range(times):
                set_entry(getattr(message, field.name), field, key, value)
        elif field.is_repeated:
            getattr(message, field.name).extend([value] * times)
        else:
            setattr(message, field.name, value)

    return apply


def set_entry(entries: Any, field: FieldDescriptor, key: int, value: Any) -> None:
    is_text = field.message_type.fields_by_name["key"].cpp_type == FieldDescriptor.CPPTYPE_STRING
    entries[str(key) if is_text else key * 101 - 50] = value


def cases(rng: random.Random) -> Iterator[Case]:
    """Endless. Of 1,000: 3 with hard grammars, 250 mutated, 100 random bytes, the rest with one to three fields at
    their edges, in such an order that each edge comes as often as any other.
    """
    methods = [method for service in SERVICES for method in service.methods]
    edge_cycles = {method.full_name: cycle_shuffled(list(changes(method.input_type)), rng) for method in methods}
    weighted = [method for method in methods for _ in range(12 if method.name.startswith("Generate") else 1)]
    for number in itertools.count():
        method, kind = rng.choice(weighted), rng.random()
        if kind < 0.003:
            yield with_pattern(number, *rng.choice(list(patterns(number))))
        elif kind < 0.1:
            yield path_of(method), rng.randbytes(rng.choice((1, 7, 60, 900)))
        elif kind < 0.1005:
            yield path_of(method), bytes(rng.choice((4 * 1024**2 - 99, 5 * 1024**2)))
        else:
            message = valid(method.input_type)
            for change in itertools.islice(edge_cycles[method.full_name], rng.randint(1, 3)):
                change(message)
            data = without_text(message.SerializeToString(), rng)
            yield path_of(method), mutated(data, rng) if kind < 0.35 else data


def cycle_shuffled(found: list[Change], rng: random.Random) -> Iterator[Change]:
    while found:
        rng.shuffle(found)
        yield from found


def without_text(data: bytes, rng: random.Random) -> bytes:
    mark = NO_TEXT.encode()
    return data.replace(mark, rng.choice(NO_UTF8).ljust(len(mark), b"a")) if mark in data else data


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, taken out, put in or cut off."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(found) + 1)
        match rng.randrange(4):
            case 0:
                found[place:place + 1] = rng.randbytes(1)
            case 1:
                del found[place:place + rng.randint(1, 8)]
            case 2:
                found[place:place] = rng.randbytes(rng.randint(1, 4))
            case 3:
                del found[place:]
    return bytes(found)
