"""What a client of a released `.proto` relies on, as facts that every later version has to keep.

A later version may say more: new messages, fields, enum values, RPCs. So a fact is a pair of what it is about and what
holds of it, and a version keeps the promise if it has all pairs of the released one. What is reserved stays reserved.
"""

from collections.abc import Iterator, Sequence

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

Fact = tuple[str, str]
Owner = DescriptorProto | EnumDescriptorProto


def breaks(released: FileDescriptorSet, now: FileDescriptorSet) -> list[str]:
    """What a client of `released` would lose with `now`, a line each; [] where the promise is kept."""
    held = dict(facts(now))
    lost = [f"{subject} was {what!r}, {_is(held.get(subject))}" for subject, what in facts(released)
            if held.get(subject) != what]
    return lost + _lost_reserves(released, now) + _taken_reserves(released, now) + _new_required(released, now)


def facts(files: FileDescriptorSet) -> Iterator[Fact]:
    """Of all files, whichever of them says it: a message may move, its full name may not change."""
    for file in files.file:
        syntax = file.syntax or "proto2"
        for name, message in _messages(file.package, file.message_type):
            yield from _message_facts(name, message, syntax)
        for name, enum in _enums(file):
            yield from _enum_facts(name, enum, syntax)
        for service in file.service:
            yield from _service_facts(f"{file.package}.{service.name}", service)


def _message_facts(name: str, message: DescriptorProto, syntax: str) -> Iterator[Fact]:
    yield f"message {name}", syntax  # which decides what absent fields mean
    for field in message.field:
        yield f"field {field.number} of {name}", _field(field, message, syntax)


def _field(field: FieldDescriptorProto, message: DescriptorProto, syntax: str) -> str:
    """All that bytes, JSON and generated code depend on."""
    kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    words = [_cardinality(field, syntax), field.type_name.removeprefix(".") or kind, field.name]
    if field.type_name:
        words.append(f"as {kind}")
    if field.HasField("oneof_index") and not field.proto3_optional:
        words.append(f"in oneof {message.oneof_decl[field.oneof_index].name}")
    if field.json_name not in ("", _json_name(field.name)):
        words.append(f"in JSON {field.json_name}")
    if field.HasField("default_value"):
        words.append(f"default {field.default_value}")
    return " ".join(words)


def _cardinality(field: FieldDescriptorProto, syntax: str) -> str:
    if field.label != FieldDescriptorProto.LABEL_OPTIONAL:
        return FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower()
    has_presence = (syntax != "proto3" or field.proto3_optional or field.HasField("oneof_index")
                    or field.type in (FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_GROUP))
    return "optional" if has_presence else "implicit"


def _json_name(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in others)


def _enum_facts(name: str, enum: EnumDescriptorProto, syntax: str) -> Iterator[Fact]:
    yield f"enum {name}", syntax  # which decides what becomes of unknown values
    for value in enum.value:
        yield f"value {value.name} of {name}", str(value.number)


def _service_facts(name: str, service: ServiceDescriptorProto) -> Iterator[Fact]:
    yield f"service {name}", "there"
    for method in service.method:
        given = f"{'stream ' if method.client_streaming else ''}{method.input_type.removeprefix('.')}"
        returned = f"{'stream ' if method.server_streaming else ''}{method.output_type.removeprefix('.')}"
        yield f"rpc {method.name} of {name}", f"({given}) returns ({returned})"


def _lost_reserves(released: FileDescriptorSet, now: FileDescriptorSet) -> list[str]:
    """What somebody could use from now on although old clients read something else there."""
    found, owners = [], dict(_owners(now))
    for name, owner in _owners(released):
        if name not in owners:
            continue
        kept, ranges = set(owners[name].reserved_name), _reserved_ranges(owners[name])
        found += [f"name {text} of {name} is no longer reserved" for text in owner.reserved_name if text not in kept]
        found += [f"numbers {start} to {end} of {name} are no longer reserved"
                  for start, end in _reserved_ranges(owner) if not _covered(start, end, ranges)]
    return found


def _covered(start: int, end: int, ranges: list[tuple[int, int]]) -> bool:
    for first, last in ranges:
        if first <= start <= last:
            start = last + 1
    return start > end


def _reserved_ranges(owner: Owner) -> list[tuple[int, int]]:
    """In order, both ends inclusive: the end of a message's range is not in it, that of an enum's is."""
    beyond = 1 if isinstance(owner, DescriptorProto) else 0
    return sorted((one.start, one.end - beyond) for one in owner.reserved_range)


def _taken_reserves(released: FileDescriptorSet, now: FileDescriptorSet) -> list[str]:
    found, reserving = [], dict(_owners(released))
    for name, owner in _owners(now):
        if name not in reserving:
            continue
        ranges, names = _reserved_ranges(reserving[name]), set(reserving[name].reserved_name)
        found += [f"{member} = {number} of {name} uses what was reserved" for member, number in _members(owner)
                  if member in names or any(start <= number <= end for start, end in ranges)]
    return found


def _new_required(released: FileDescriptorSet, now: FileDescriptorSet) -> list[str]:
    """Required fields that old clients do not send."""
    known = dict(facts(released))
    return [f"{subject} is new and required" for subject, what in facts(now)
            if what.startswith("required ") and subject not in known]


def _members(owner: Owner) -> list[tuple[str, int]]:
    items = owner.field if isinstance(owner, DescriptorProto) else owner.value
    return [(one.name, one.number) for one in items]


def _owners(files: FileDescriptorSet) -> Iterator[tuple[str, Owner]]:
    for file in files.file:
        yield from _messages(file.package, file.message_type)
        yield from _enums(file)


def _messages(prefix: str, messages: Sequence[DescriptorProto]) -> Iterator[tuple[str, DescriptorProto]]:
    """With full names, those inside others too."""
    for message in messages:
        name = f"{prefix}.{message.name}"
        yield name, message
        yield from _messages(name, message.nested_type)


def _enums(file: FileDescriptorProto) -> Iterator[tuple[str, EnumDescriptorProto]]:
    for enum in file.enum_type:
        yield f"{file.package}.{enum.name}", enum
    for prefix, message in _messages(file.package, file.message_type):
        for enum in message.enum_type:
            yield f"{prefix}.{enum.name}", enum


def _is(what: str | None) -> str:
    return "is gone" if what is None else f"is {what!r}"
