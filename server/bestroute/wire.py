"""Decodes requests without losing the reason when they are malformed.

gRPC answers INTERNAL when a message can't be parsed, and ends the stream it came on; of several
members of a oneof, a parser silently keeps the last. A decoder made here returns `Malformed`
instead, which names the field, so that the caller gets INVALID_ARGUMENT and its stream goes on.

A message that is within the limit on bytes may still be made to cost: each of its fields can take
two bytes on the wire, fifty in memory, and some time of the event loop. So their number is limited,
and counted before anything is parsed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message

from bestroute.errors import InvalidRequest

RequestT = TypeVar("RequestT", bound=Message)

MOST_FIELDS = 8192
"""Of one message, those of the messages in it counted too: some 2700 turns of a conversation."""

MOST_ID_BYTES = 1024
"""Of a request_id, which is kept in memory, logged and sent back."""

_SMALLEST = 2
"""Bytes of the smallest field: a tag and an empty value."""


@dataclass(frozen=True, slots=True)
class Malformed(Generic[RequestT]):
    """A message that could not be decoded: why, and the id that its answer should carry."""

    error: InvalidRequest
    request_id: str


def decoder(message: type[RequestT]) -> Callable[[bytes], RequestT | Malformed[RequestT]]:
    """A request deserializer for gRPC that never raises."""

    def decode(data: bytes) -> RequestT | Malformed[RequestT]:
        if len(data) > MOST_FIELDS * _SMALLEST and (crowded := _crowded(message, data)):
            return crowded
        try:
            decoded = message.FromString(data)
        except DecodeError:
            return _diagnose(message, data) or Malformed(
                InvalidRequest("(message)", f"not a {message.DESCRIPTOR.full_name}"),
                _survey(message.DESCRIPTOR, data).request_id,
            )
        if len(data) > MOST_ID_BYTES and (overlong := _overlong(decoded)):
            return overlong
        # Whatever the parser dropped is missing from the size; only then is a closer look due.
        if decoded.ByteSize() != len(data):
            return _diagnose(message, data) or decoded
        return decoded

    return decode


def _crowded(message: type[RequestT], data: bytes) -> Malformed[RequestT] | None:
    survey = _survey(message.DESCRIPTOR, data)
    if survey.fields <= MOST_FIELDS:
        return None
    error = InvalidRequest("(message)", f"more than the {MOST_FIELDS} fields that it may have")
    return Malformed(error, survey.request_id)


def _overlong(decoded: Any) -> Malformed[Any] | None:
    field, request = "request_id", decoded
    if "request" in decoded.DESCRIPTOR.fields_by_name:
        field, request = "request.request_id", decoded.request
    request_id = getattr(request, "request_id", "")
    if len(request_id) <= MOST_ID_BYTES // 4 or len(request_id.encode()) <= MOST_ID_BYTES:
        return None
    error = InvalidRequest(field, f"must be at most {MOST_ID_BYTES} bytes")
    return Malformed(error, _shown(request_id.encode()))


@dataclass(slots=True)
class _Survey:
    """What can be told of a message without parsing it.

    Attributes:
        fields: how many it has, in all. None is counted after one too many, nor where a parser
            would have given up.
        request_id: the caller's, if it comes before that.
    """

    fields: int = 0
    request_id: str = ""


def _survey(contract: Any, data: bytes) -> _Survey:
    survey = _Survey()
    known = _known(contract)
    around: list[tuple[_Known, int]] = []  # what is known of the messages around, and their ends
    at, end = 0, len(data)
    try:
        while survey.fields <= MOST_FIELDS:
            while at == end:
                if not around:
                    return survey
                known, end = around.pop()
            tag, at = _varint(data, at)
            survey.fields += 1
            size = 0
            match tag & 7:
                case 0:  # a varint
                    _, at = _varint(data, at)
                case 1 | 5 as kind:  # 8 bytes, or 4
                    size = 8 if kind == 1 else 4
                case 2:  # as many bytes as it says
                    size, at = _varint(data, at)
                case 3 | 4:  # a group, which the contract has none of: its fields count as well
                    pass
                case _:
                    return survey
            name, inside = known.get(tag >> 3, ("", None)) if tag & 7 == 2 else ("", None)
            if inside is not None:
                around.append((known, end))
                known, end = _known(inside), min(at + size, end)
                continue
            if at + size > end:
                return survey
            if name == "request_id":
                survey.request_id = _shown(data[at : at + size])
            at += size
    except IndexError:  # it ends within a field
        pass
    return survey


_Known = dict[int, tuple[str, Descriptor | None]]


@cache
def _known(contract: Any) -> _Known:
    """The fields of a message by number: the name of each, and the message that it holds."""
    return {field.number: (field.name, field.message_type) for field in contract.fields}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of a variable number of bytes, and where it ends; IndexError: it doesn't."""
    value = shift = 0
    while (byte := data[at]) & 0x80:
        if shift > 56:  # the tenth byte is the last
            raise IndexError
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return value | byte << shift, at + 1


def _shown(request_id: bytes) -> str:
    """A request_id as far as it can be sent back."""
    return request_id[:MOST_ID_BYTES].decode(errors="replace")


def _diagnose(message: type[RequestT], data: bytes) -> Malformed[RequestT] | None:
    """Parse again with nothing checked or dropped, and look for what breaks the contract."""
    descriptor = message.DESCRIPTOR
    try:
        raw = _lenient(descriptor).FromString(data)
    except DecodeError:
        return None
    inner = raw.request if "request" in descriptor.fields_by_name else raw
    request_id = _shown(getattr(inner, "request_id", b""))
    for path, description in _faults(raw, descriptor, ""):
        return Malformed(InvalidRequest(path, description), request_id)
    return None


@cache
def _lenient(contract: Any) -> type[Any]:
    """A message's class where strings are bytes and a oneof is several fields."""
    pool = descriptor_pool.DescriptorPool()
    for file in _with_dependencies(contract.file):
        copy = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(copy)
        copy.syntax = "proto2"  # where every field knows whether it was set
        for message in copy.message_type:
            _loosen(message)
        pool.Add(copy)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(contract.full_name))


def _with_dependencies(file: FileDescriptor) -> list[FileDescriptor]:
    """The file and all it imports, each after what it imports."""
    files: dict[str, FileDescriptor] = {}
    for dependency in file.dependencies:
        files |= {each.name: each for each in _with_dependencies(dependency)}
    return [*files.values(), file]


def _loosen(message: descriptor_pb2.DescriptorProto) -> None:
    for field in message.field:
        if field.type == FieldDescriptor.TYPE_STRING:
            field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
        field.ClearField("oneof_index")
        field.ClearField("proto3_optional")
    message.ClearField("oneof_decl")
    for nested in message.nested_type:
        _loosen(nested)


def _faults(message: Any, contract: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Every fault below a leniently parsed message: its path and what is wrong."""
    for oneof in contract.oneofs:
        given = [field.name for field in oneof.fields if message.HasField(field.name)]
        if len(given) > 1:
            yield f"{prefix}{oneof.name}", f"set only one of: {', '.join(given)}"
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        items = [(path, value)]
        if field.is_repeated:
            items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        for item_path, item in items:
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                inner = contract.fields_by_name[field.name].message_type
                yield from _faults(item, inner, f"{item_path}.")
            elif contract.fields_by_name[field.name].type == FieldDescriptor.TYPE_STRING:
                try:
                    item.decode()
                except UnicodeDecodeError as error:
                    yield item_path, f"not valid UTF-8: {error}"
