"""What clients of the last release rely on still holds; and every kind of break would be seen."""

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet

from serve.protos import release
from serve.protos.compatibility import breaks

SMALL = """
file { name: "a.proto" package: "a" syntax: "proto3"
  message_type { name: "Ask"
    field { name: "text_form" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING oneof_index: 0 }
    field { name: "ids" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".a.Ids" oneof_index: 0 }
    field { name: "seed" number: 3 label: LABEL_OPTIONAL type: TYPE_INT64 oneof_index: 1 proto3_optional: true }
    field { name: "stops" number: 4 label: LABEL_REPEATED type: TYPE_STRING }
    field { name: "kind" number: 5 label: LABEL_OPTIONAL type: TYPE_ENUM type_name: ".a.Kind" }
    oneof_decl { name: "prompt" } oneof_decl { name: "_seed" }
    nested_type { name: "Part" field { name: "x" number: 1 label: LABEL_OPTIONAL type: TYPE_INT32 } }
    reserved_range { start: 8 end: 11 } reserved_name: "old" }
  message_type { name: "Ids" field { name: "ids" number: 1 label: LABEL_REPEATED type: TYPE_INT32 } }
  enum_type { name: "Kind" value { name: "NONE" number: 0 } value { name: "SOME" number: 1 }
    reserved_range { start: 5 end: 6 } reserved_name: "OLD" }
  service { name: "Asking"
    method { name: "One" input_type: ".a.Ask" output_type: ".a.Ids" }
    method { name: "Many" input_type: ".a.Ask" output_type: ".a.Ids" server_streaming: true } }
}
"""
Change = Callable[[FileDescriptorProto], object]


def small() -> FileDescriptorSet:
    return text_format.Parse(SMALL, FileDescriptorSet())


def changed(change: Change) -> FileDescriptorSet:
    found = small()
    change(found.file[0])
    assert found != small()
    return found


def ask(file: FileDescriptorProto) -> DescriptorProto:
    return file.message_type[0]


def set_(get: Callable[[FileDescriptorProto], object], **values: object) -> Change:
    return lambda file: [setattr(get(file), name, value) for name, value in values.items()]


def move_seed_into_the_oneof(file: FileDescriptorProto) -> None:
    seed = ask(file).field[2]
    seed.oneof_index = 0
    seed.ClearField("proto3_optional")


def lose_presence(file: FileDescriptorProto) -> None:
    for name in ("proto3_optional", "oneof_index"):
        ask(file).field[2].ClearField(name)


def leave_the_oneof(file: FileDescriptorProto) -> None:
    ask(file).field[0].oneof_index = 2
    ask(file).field[0].proto3_optional = True
    ask(file).oneof_decl.add(name="_text_form")


def removed_though_reserved(file: FileDescriptorProto) -> None:
    del ask(file).field[3]
    ask(file).reserved_range.add(start=4, end=5)


def field(number: int, name: str, **more: object) -> FieldDescriptorProto:
    return FieldDescriptorProto(**{"number": number, "name": name, "label": FieldDescriptorProto.LABEL_OPTIONAL,
                                   "type": FieldDescriptorProto.TYPE_INT32, **more})  # type: ignore[arg-type]


REPEATED, REQUIRED = FieldDescriptorProto.LABEL_REPEATED, FieldDescriptorProto.LABEL_REQUIRED
BREAKS: dict[str, tuple[Change, str]] = {
    "message removed": (lambda file: file.message_type.pop(1), "message a.Ids was 'proto3', is gone"),
    "message renamed": (set_(ask, name="Question"), "message a.Ask was"),
    "nested message removed": (lambda file: ask(file).nested_type.pop(), "message a.Ask.Part"),
    "nested field retyped": (set_(lambda file: ask(file).nested_type[0].field[0], type=3), "field 1 of a.Ask.Part"),
    "field removed": (lambda file: ask(file).field.pop(3), "field 4 of a.Ask was 'repeated string stops', is gone"),
    "field removed, its number reserved": (removed_though_reserved, "field 4 of a.Ask"),
    "field renamed": (set_(lambda file: ask(file).field[3], name="ends"), "is 'repeated string ends'"),
    "field renumbered": (set_(lambda file: ask(file).field[3], number=6), "field 4 of a.Ask"),
    "field retyped": (set_(lambda file: ask(file).field[2], type=4), "was 'optional int64 seed', is 'optional uint64"),
    "field of another message": (set_(lambda file: ask(file).field[1], type_name=".a.Ask"), "field 2 of a.Ask"),
    "label changed": (set_(lambda file: ask(file).field[3], label=1), "is 'implicit string stops'"),
    "presence lost": (lose_presence, "is 'implicit int64 seed'"),
    "moved into a oneof": (move_seed_into_the_oneof, "seed in oneof prompt"),
    "moved out of a oneof": (leave_the_oneof, "was 'optional string text_form in oneof prompt'"),
    "oneof renamed": (set_(lambda file: ask(file).oneof_decl[0], name="input"), "in oneof input"),
    "renamed in JSON": (set_(lambda file: ask(file).field[0], json_name="text"), "in JSON text"),
    "default given": (set_(lambda file: ask(file).field[3], default_value="x"), "default x"),
    "syntax changed": (set_(lambda file: file, syntax="proto2"), "message a.Ask was 'proto3', is 'proto2'"),
    "package changed": (set_(lambda file: file, package="b"), "service a.Asking was"),
    "enum removed": (lambda file: file.enum_type.pop(), "enum a.Kind"),
    "value removed": (lambda file: file.enum_type[0].value.pop(), "value SOME of a.Kind was '1', is gone"),
    "value renamed": (set_(lambda file: file.enum_type[0].value[1], name="FEW"), "value SOME of a.Kind"),
    "value renumbered": (set_(lambda file: file.enum_type[0].value[1], number=2), "was '1', is '2'"),
    "service removed": (lambda file: file.service.pop(), "service a.Asking"),
    "RPC removed": (lambda file: file.service[0].method.pop(), "rpc Many of a.Asking"),
    "RPC renamed": (set_(lambda file: file.service[0].method[0], name="Single"), "rpc One of a.Asking"),
    "RPC takes another message": (set_(lambda file: file.service[0].method[0], input_type=".a.Ids"), "is '(a.Ids)"),
    "RPC returns another message": (set_(lambda file: file.service[0].method[0], output_type=".a.Ask"), "rpc One"),
    "answer no longer streamed": (set_(lambda file: file.service[0].method[1], server_streaming=False), "rpc Many"),
    "request streamed": (set_(lambda file: file.service[0].method[0], client_streaming=True), "(stream a.Ask)"),
    "reserved number used": (lambda file: ask(file).field.append(field(10, "new")), "new = 10 of a.Ask uses what"),
    "reserved name used": (lambda file: ask(file).field.append(field(7, "old")), "old = 7 of a.Ask uses what"),
    "reserved value used": (lambda file: file.enum_type[0].value.add(name="NEW", number=6), "NEW = 6 of a.Kind"),
    "reserved value's name used": (lambda file: file.enum_type[0].value.add(name="OLD", number=7), "OLD = 7 of"),
    "numbers no longer reserved": (set_(lambda file: ask(file).reserved_range[0], end=10), "numbers 8 to 10 of a.Ask"),
    "values no longer reserved": (lambda file: file.enum_type[0].reserved_range.pop(), "numbers 5 to 6 of a.Kind"),
    "name no longer reserved": (lambda file: ask(file).reserved_name.pop(), "name old of a.Ask is no longer"),
    "required field added": (lambda file: ask(file).field.append(field(7, "new", label=REQUIRED)), "7 of a.Ask is new"),
}
ADDITIONS: dict[str, Change] = {
    "message": lambda file: file.message_type.add(name="New"),
    "nested message": lambda file: ask(file).nested_type.add(name="New"),
    "field": lambda file: ask(file).field.append(field(7, "new")),
    "repeated field": lambda file: ask(file).field.append(field(11, "new", label=REPEATED)),
    "field of a oneof": lambda file: ask(file).field.append(field(7, "new", oneof_index=0)),
    "enum": lambda file: file.enum_type.add(name="New"),
    "value": lambda file: file.enum_type[0].value.add(name="MORE", number=2),
    "service": lambda file: file.service.add(name="New"),
    "RPC": lambda file: file.service[0].method.add(name="New", input_type=".a.Ask", output_type=".a.Ids"),
    "reserved": lambda file: (ask(file).reserved_range.add(start=20, end=30), ask(file).reserved_name.append("x")),
    "reserved more, in pieces": lambda file: ask(file).reserved_range.MergeFrom(
        [DescriptorProto.ReservedRange(start=11, end=15), DescriptorProto.ReservedRange(start=8, end=9)]),
    "order": lambda file: ask(file).field.sort(key=lambda one: -one.number),
    "comment": lambda file: file.source_code_info.location.add(leading_comments="new"),
}


def test_the_last_release_is_kept():
    assert breaks(release.read(), release.current()) == []


@pytest.mark.parametrize("kind", BREAKS)
def test_a_break_is_found(kind: str):
    change, text = BREAKS[kind]
    found = breaks(small(), changed(change))
    assert any(text in line for line in found), found


@pytest.mark.parametrize("kind", ADDITIONS)
def test_an_addition_is_allowed(kind: str):
    assert breaks(small(), changed(ADDITIONS[kind])) == []


def test_every_field_and_rpc_of_the_release_is_held():
    """Each taken away alone: none of them is overlooked, for whatever place it has."""
    count = 0
    for file in range(len(release.current().file)):
        for message in range(len(release.current().file[file].message_type)):
            for index in range(len(release.current().file[file].message_type[message].field)):
                now = release.current()
                name = now.file[file].message_type[message].field.pop(index).name
                assert [line for line in breaks(release.current(), now) if name in line], name
                count += 1
        for index in range(len(release.current().file[file].service[0].method)):
            now = release.current()
            name = now.file[file].service[0].method.pop(index).name
            assert len(breaks(release.current(), now)) == 1, name
            count += 1
    assert count > 80


def test_the_record_is_of_this_version():
    """A release without its record would leave what it added without a promise."""
    assert release.RECORD.read_text().splitlines()[0] == f"# {release.title()}"


def test_a_release_writes_its_record_and_never_a_broken_promise(tmp_path: Path):
    path = tmp_path / "released.textproto"
    assert release.write(path, small()) == [] and release.read(path) == small()
    more = changed(ADDITIONS["field"])
    assert release.write(path, more) == [] and release.read(path) == more
    assert release.write(path, small()) == ["field 7 of a.Ask was 'implicit int32 new', is gone"]
    assert release.read(path) == more
