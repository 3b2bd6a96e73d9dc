"""Decodes requests without losing the reason when they are malformed.

gRPC answers INTERNAL when a message can't be parsed, and ends the stream it came on; of several
members of a oneof, a parser silently keeps the last. A decoder made here returns `Malformed`
instead, which names the field, so that the caller gets INVALID_ARGUMENT and its stream goes on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message

from bestroute.errors import InvalidRequest
from bestroute.v1 import routing_pb2

RequestT = TypeVar("RequestT", bound=Message)


@dataclass(frozen=True, slots=True)
class Malformed(Generic[RequestT]):
    """A message that could not be decoded: why, and the id that its answer should carry."""

    error: InvalidRequest
    request_id: str


def decoder(message: type[RequestT]) -> Callable[[bytes], RequestT | Malformed[RequestT]]:
    """A request deserializer for gRPC that never raises."""

    def decode(data: bytes) -> RequestT | Malformed[RequestT]:
        try:
            decoded = message.FromString(data)
        except DecodeError:
            return _diagnose(message, data) or Malformed(
                InvalidRequest("(message)", f"not a {message.DESCRIPTOR.full_name}"), ""
            )
        # Whatever the parser dropped is missing from the size; only then is a closer look due.
        if decoded.ByteSize() != len(data):
            return _diagnose(message, data) or decoded
        return decoded

    return decode


def _diagnose(message: type[RequestT], data: bytes) -> Malformed[RequestT] | None:
    """Parse again with nothing checked or dropped, and look for what breaks the contract."""
    descriptor = message.DESCRIPTOR
    try:
        raw = _lenient(descriptor.full_name).FromString(data)
    except DecodeError:
        return None
    inner = raw.request if "request" in descriptor.fields_by_name else raw
    request_id = getattr(inner, "request_id", b"").decode(errors="replace")
    for path, description in _faults(raw, descriptor, ""):
        return Malformed(InvalidRequest(path, description), request_id)
    return None


@cache
def _lenient(name: str) -> type[Any]:
    """The message class of that name where strings are bytes and a oneof is several fields."""
    pool = descriptor_pool.DescriptorPool()
    for file in _with_dependencies(routing_pb2.DESCRIPTOR):
        copy = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(copy)
        copy.syntax = "proto2"  # where every field knows whether it was set
        for message in copy.message_type:
            _loosen(message)
        pool.Add(copy)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


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
