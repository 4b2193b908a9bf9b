"""The bytes of a tf.train.Example, read and written without TensorFlow.

Example { features { feature: map<string, bytes_list | float_list | int64_list> } }: TFRecord and
ArrayRecord files of TFDS, img2dataset and this package hold these.
"""

import struct
from collections.abc import Mapping, Sequence

from internvl_jax.data.errors import RecordError

Value = bytes | str | int | float


def decode(data: bytes) -> dict[str, list]:
    """Lists of values by name. Raises RecordError where the bytes are not an Example."""
    try:
        found = {}
        for features in _submessages(data, 1):
            for entry in _submessages(features, 1):
                parts = dict(_fields(entry))
                name = bytes(parts[1]).decode()
                found[name] = _values(parts.get(2, b""))
        return found
    except (ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise RecordError("corrupt_record", f"not a tf.train.Example: {error!r}") from error


def encode(features: Mapping[str, Value | Sequence[Value]]) -> bytes:
    """An Example of the values, in the order of their names."""
    entries = b""
    for name, values in sorted(features.items()):
        if isinstance(values, bytes | str | int | float):
            values = [values]
        if all(isinstance(v, int) for v in values):
            packed = b"".join(_varint(v & 0xFFFFFFFFFFFFFFFF) for v in values)
            feature = _field(3, _field(1, packed))
        elif all(isinstance(v, int | float) for v in values):
            feature = _field(2, _field(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            texts = (v.encode() if isinstance(v, str) else v for v in values)
            feature = _field(1, b"".join(_field(1, v) for v in texts))
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def _values(feature):
    for kind, content in _fields(feature):
        if kind == 1:
            return [bytes(v) for v in _submessages(content, 1)]
        if kind == 2:
            floats = []
            for _, part in _fields(content):
                floats += struct.unpack(f"<{len(part) // 4}f", part)
            return floats
        if kind == 3:
            return [
                _signed(n) for _, part in _fields(content)
                for n in ([part] if isinstance(part, int) else _packed(part))
            ]
    return []


def _submessages(data, number):
    return [value for field, value in _fields(data) if field == number]


def _fields(data):
    """(field number, int or memoryview) pairs of a message."""
    data, position = memoryview(data), 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if kind == 2:
            size, position = _read_varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + size > len(data):
            raise ValueError("a field is longer than its message")
        yield number, data[position : position + size]
        position += size


def _read_varint(data, position):
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _packed(part):
    position = 0
    while position < len(part):
        value, position = _read_varint(part, position)
        yield value


def _signed(value):
    return value - (1 << 64) if value >= 1 << 63 else value


def _varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number, content):
    return _varint(number << 3 | 2) + _varint(len(content)) + content
