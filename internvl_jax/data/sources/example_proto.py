"""The bytes of a tf.train.Example, read and written without TensorFlow.

TFRecord and ArrayRecord files of TFDS, img2dataset and this package hold these. The messages are
declared here, under a name of our own, so that they never meet TensorFlow's in one process.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from internvl_jax.data.errors import RecordError

Value = bytes | str | int | float
_PACKAGE = "internvl_jax.data"
_FIELD = descriptor_pb2.FieldDescriptorProto
_LISTS = {"bytes_list": _FIELD.TYPE_BYTES, "float_list": _FIELD.TYPE_FLOAT,
          "int64_list": _FIELD.TYPE_INT64}


Spans = Mapping[str, tuple[int, int]]


def spans(data: bytes) -> tuple[bytes, Spans]:
    """(Example, where in it each feature's message lies, by the feature's name).

    The Example is `data` itself, or the same content in the order that writers use. Nothing is
    copied: a parser would copy an image twice. Raises RecordError for bytes that are no Example.
    """
    if (found := _walked(data)) is None:
        try:
            example = _message("Example").FromString(data)
        except message.DecodeError as error:
            raise RecordError("corrupt_record", f"not a tf.train.Example: {error}") from error
        example.DiscardUnknownFields()
        data = example.SerializeToString(deterministic=True)
        found = _walked(data)
        assert found is not None
    return data, found


def values(feature: bytes) -> list:
    """What the message of a feature holds: bytes, floats or integers."""
    try:
        parsed = _message("Feature").FromString(feature)
    except message.DecodeError as error:
        raise RecordError("corrupt_record", f"not a tf.train.Feature: {error}") from error
    kind = parsed.WhichOneof("kind")
    return list(getattr(parsed, kind).value) if kind else []


def only_bytes(data: bytes, start: int, stop: int) -> bytes | None:
    """The bytes of a feature that holds exactly one value of bytes; None for any other."""
    try:
        for _ in ("bytes_list", "value"):
            tag = data[start]
            size, start = _varint(data, start + 1)
            if tag != _FIRST or start + size != stop:
                return None
    except IndexError:
        return None
    return data[start:stop]


_FIRST, _SECOND = 0x0A, 0x12  # tags of a message's fields 1 and 2 that have a length


def _walked(data: bytes) -> dict[str, tuple[int, int]] | None:
    """The spans of an Example as writers lay it out, or None."""
    found: dict[str, tuple[int, int]] = {}
    try:
        at, end = 0, len(data)
        if end:
            size, at = _varint(data, 1)
            if data[0] != _FIRST or at + size != end:
                return None
        while at < end:
            tag = data[at]
            size, at = _varint(data, at + 1)
            stop = at + size
            length, key = _varint(data, at + 1)
            if tag != _FIRST or data[at] != _FIRST or data[key + length] != _SECOND:
                return None
            size, start = _varint(data, key + length + 1)
            name = data[key : key + length].decode()
            if start + size != stop or stop > end or name in found:
                return None
            found[name] = start, stop
            at = stop
    except (IndexError, UnicodeDecodeError):
        return None
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends)."""
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    number, shift = byte & 127, 7
    while True:
        at += 1
        byte = data[at]
        if shift > 63:
            raise IndexError
        if byte < 128:
            return number | byte << shift, at + 1
        number |= (byte & 127) << shift
        shift += 7


def encode(features: Mapping[str, Value | Sequence[Value]]) -> bytes:
    """An Example of the values; equal values give equal bytes."""
    example = _message("Example")()
    for name, given in features.items():
        if isinstance(given, bytes | str | int | float):
            given = [given]
        if all(isinstance(v, int) for v in given):
            kind = "int64_list"
        elif all(isinstance(v, int | float) for v in given):
            kind = "float_list"
        else:
            kind = "bytes_list"
            given = [v.encode() if isinstance(v, str) else v for v in given]
        getattr(example.features.feature[name], kind).value.extend(given)
    return example.SerializeToString(deterministic=True)


@functools.cache
def _message(name: str) -> Any:
    """The class of one of the messages of an Example, which is
    Example { features { feature: map<string, bytes_list | float_list | int64_list> } }.
    """
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(
        name="internvl_jax/example.proto", package=_PACKAGE, syntax="proto3"
    )

    def add(name, parent=file.message_type):
        added = parent.add()
        added.name = name
        return added

    def field(owner, name, number, kind, of="", repeated=False, **more):
        label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
        if of:
            more["type_name"] = f".{_PACKAGE}.{of}"
        owner.field.add(name=name, number=number, type=kind, label=label, **more)

    feature = add("Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(_LISTS.items(), start=1):
        field(add(name), "value", 1, kind, repeated=True)
        field(feature, name, number, _FIELD.TYPE_MESSAGE, name, oneof_index=0)
    features = add("Features")
    entry = add("FeatureEntry", features.nested_type)
    entry.options.map_entry = True
    field(entry, "key", 1, _FIELD.TYPE_STRING)
    field(entry, "value", 2, _FIELD.TYPE_MESSAGE, "Feature")
    field(features, "feature", 1, _FIELD.TYPE_MESSAGE, "Features.FeatureEntry", repeated=True)
    field(add("Example"), "features", 1, _FIELD.TYPE_MESSAGE, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
