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


def parse(data: bytes) -> Mapping[str, Any]:
    """The features by name, as messages. Raises RecordError where the bytes are not an Example."""
    try:
        return _example_class().FromString(data).features.feature
    except message.DecodeError as error:
        raise RecordError("corrupt_record", f"not a tf.train.Example: {error}") from error


def values(feature: Any) -> list:
    """What a feature holds: bytes, floats or integers."""
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []


def encode(features: Mapping[str, Value | Sequence[Value]]) -> bytes:
    """An Example of the values; equal values give equal bytes."""
    example = _example_class()()
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
def _example_class() -> Any:
    """Example { features { feature: map<string, bytes_list | float_list | int64_list> } }."""
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
    found = pool.FindMessageTypeByName(f"{_PACKAGE}.Example")
    return message_factory.GetMessageClass(found)
