"""TFRecord, ArrayRecord and parquet: against the libraries' own readers, and damaged files."""

import json
import os
import struct

import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from internvl_jax.data import sources
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import example_proto, examples
from internvl_jax.data.sources.parquet import cached


def example(make, number):
    about = {"caption": f"picture {number}", "width": 40}
    return example_proto.encode({"jpg": make.picture(number), "json": json.dumps(about)})


@pytest.fixture
def tfrecords(tmp_path, make):
    for shard in range(2):
        frames = [examples.frame(example(make, shard * 4 + i)) for i in range(4)]
        (tmp_path / f"{shard}.tfrecord").write_bytes(b"".join(frames))
    return tmp_path


@pytest.fixture
def arrayrecords(tmp_path, make):
    for shard in range(2):
        writer = ArrayRecordWriter(f"{tmp_path}/{shard}.array_record", "group_size:1,uncompressed")
        for i in range(4):
            writer.write(example(make, shard * 4 + i))
        writer.close()
    return tmp_path


def test_examples_are_those_of_tensorflow():
    """Against the protocol buffer class that tensorflow-datasets ships."""
    from tensorflow_datasets.proto import tf_example_generated_pb2 as reference

    values = {"b": [b"x", b"\xff"], "f": [0.5, -2.0], "i": [3, -1, 1 << 40], "s": ["ü"]}
    theirs = reference.Example.FromString(example_proto.encode(values))
    feature = theirs.features.feature
    assert list(feature["b"].bytes_list.value) == values["b"]
    assert list(feature["f"].float_list.value) == values["f"]
    assert list(feature["i"].int64_list.value) == values["i"]
    assert decoded(theirs.SerializeToString()) == {**values, "s": ["ü".encode()]}


def decoded(data):
    data, spans = example_proto.spans(data)
    return {name: example_proto.values(data[a:b]) for name, (a, b) in spans.items()}


def test_examples_in_any_layout():
    """The protocol allows more than writers make use of."""
    plain = example_proto.encode({"jpg": b"x" * 300, "k" * 200: 3, "none": []})
    data, spans = example_proto.spans(plain)
    assert data is plain and example_proto.only_bytes(data, *spans["jpg"]) == b"x" * 300
    assert example_proto.only_bytes(data, *spans["k" * 200]) is None
    assert decoded(plain) == {"jpg": [b"x" * 300], "k" * 200: [3], "none": []}
    feature = plain[slice(*spans["jpg"])]
    size = lambda part: bytes([len(part)]) if len(part) < 128 else bytes(  # noqa: E731
        [len(part) & 127 | 128, len(part) >> 7]
    )
    key, value = b"\x0a\x03jpg", b"\x12" + size(feature) + feature
    for entries in (
        [value + key],  # the value before the key
        [key + value, key + value],  # twice
    ):
        inner = b"".join(b"\x0a" + size(entry) + entry for entry in entries)
        assert decoded(b"\x0a" + size(inner) + inner) == {"jpg": [b"x" * 300]}
    assert decoded(plain + b"\x18\x01") == decoded(plain)
    assert decoded(b"") == decoded(b"\x0a\x00") == {}
    for damaged in (plain[:-1], b"\xff" * 40, b"\x0a" + b"\x80" * 30):
        with pytest.raises(RecordError, match=r"not a tf\.train\.Example"):
            example_proto.spans(damaged)


@pytest.mark.parametrize("kind", ["tfrecord", "arrayrecord"])
def test_records_in_any_order(kind, request, make):
    folder = request.getfixturevalue(f"{kind}s")
    ending = {"tfrecord": "tfrecord", "arrayrecord": "array_record"}[kind]
    source = sources.open_source(f"{kind}:{folder}/{{0..1}}.{ending}?language=de")
    handles = source.fetch([7, 0, 5])
    assert [source.image_in(h) for h in handles] == [make.picture(n) for n in (7, 0, 5)]
    assert [source.texts_in(h)["captions"]["de"] for h in handles] == [
        (f"picture {n}",) for n in (7, 0, 5)
    ]
    assert len(source) == 8 and source.image(3).shape == (30, 40, 3)
    assert sources.spec_of(f"{folder}/{{0..1}}.{ending}").startswith(f"{kind}:")


def test_frames_are_those_of_the_specification(tfrecords):
    """A frame with the checksum of the format's documentation: masked CRC-32C."""
    import google_crc32c

    data = (tfrecords / "0.tfrecord").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    crc = google_crc32c.value(data[12 : 12 + length])
    masked = ((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8 & 0xFFFFFFFF
    assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked,)


def test_damaged_tfrecord(tfrecords):
    path = tfrecords / "0.tfrecord"
    source = sources.TfRecords(str(path))
    at = int(source.index.rows[1]["at"]) + 30
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\0\1\2\3")
    end = int(source.index.rows[3]["at"]) + 10
    os.truncate(path, end)
    source = sources.TfRecords(str(path))
    found = source.fetch(range(len(source)))
    causes = [h.cause if isinstance(h, RecordError) else None for h in found]
    assert causes == [None, "corrupt_record", None, "truncated"]
    os.truncate(path, end - 15)  # now inside the header of the last frame
    source = sources.TfRecords(str(path))
    assert len(source) == 3 and source.index.problems[0][1] == "truncated"


def test_compressed_tfrecord_is_refused(tmp_path):
    (tmp_path / "x.tfrecord").write_bytes(b"\x1f\x8b\x08" + bytes(20))
    with pytest.raises(ValueError, match="is compressed"):
        sources.TfRecords(f"{tmp_path}/x.tfrecord")


def test_damaged_arrayrecord(arrayrecords, make):
    path = arrayrecords / "0.array_record"
    content = bytearray(path.read_bytes())
    at = content.index(make.picture(2)) + 100
    content[at : at + 4] = b"\0\1\2\3"
    path.write_bytes(content)
    source = sources.ArrayRecords(str(path))
    handles = source.fetch(range(4))
    assert [isinstance(h, RecordError) for h in handles] == [False, False, True, False]
    assert handles[2].cause == "corrupt_record" and source.image_in(handles[3]) == make.picture(3)
    os.truncate(path, len(content) - 60)
    with pytest.raises(ValueError, match=r"cannot open .*0.array_record"):
        sources.ArrayRecords(str(path))


def test_not_an_example(tmp_path):
    for number, blob in enumerate((b"\xff\xff\xff", b"\x0a\x7f123")):
        (tmp_path / f"{number}.tfrecord").write_bytes(examples.frame(blob))
        source = sources.TfRecords(f"{tmp_path}/{number}.tfrecord")
        with pytest.raises(RecordError, match=r"tfrecord: record 0: not a tf.train.Example"):
            source.texts(0)


def test_parquet_of_both_kinds(tmp_path, make):
    pictures = [make.picture(n) for n in range(5)]
    captions = [f"picture {n}" for n in range(5)]
    parquet.write_table(pa.table({"jpg": pictures, "caption": captions}), tmp_path / "a.parquet")
    structs = [{"bytes": p, "path": "x.jpg"} for p in pictures]
    parquet.write_table(pa.table({"image": structs, "text": captions}), tmp_path / "b.parquet")
    for name in ("a", "b"):
        source = sources.open_source(f"parquet:{tmp_path}/{name}.parquet")
        assert [source.image_in(source.handle(i)) for i in (4, 1)] == [pictures[4], pictures[1]]
        assert source.texts(2)["captions"] == {"en": ("picture 2",)}
    first = cached(f"{tmp_path}/a.parquet")
    before = os.stat(first).st_mtime_ns
    assert cached(f"{tmp_path}/a.parquet") == first and os.stat(first).st_mtime_ns == before
    changed = pa.table({"jpg": pictures[:2], "caption": ["x", "y"]})
    parquet.write_table(changed, tmp_path / "a.parquet")
    assert len(sources.open_source(f"parquet:{tmp_path}/a.parquet")) == 2
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"c.parquet cannot be read as parquet"):
        cached(f"{tmp_path}/c.parquet")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_identity_follows_the_content(arrayrecords, tfrecords):
    for pattern in ("arrayrecord:{}/0.array_record", "tfrecord:{}/0.tfrecord"):
        spec = pattern.format(arrayrecords)
        other = spec.replace("/0.", "/1.")
        assert sources.open_source(spec).identity == sources.open_source(spec).identity
        assert sources.open_source(spec).identity != sources.open_source(other).identity
