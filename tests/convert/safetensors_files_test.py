"""Our reader and writer against the safetensors package, lying headers, interrupted writes."""

import json
import os
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from internvl_jax.convert.safetensors_files import FileError, Spec, Tensors, new_directory, write


def arrays():
    rng = np.random.default_rng(0)
    return {
        "wide": rng.normal(size=(3, 5)),
        "single": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "brain": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=(4, 1)).astype(np.float16),
        "ids": np.arange(6, dtype=np.int64),
        "flags": np.array([True, False]),
        "scalar": np.asarray(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def specs(tensors):
    return {name: Spec(array.shape, array.dtype) for name, array in tensors.items()}


def assert_same(result, expected):
    assert set(result) == set(expected)
    for name, array in expected.items():
        assert result[name].dtype == array.dtype and result[name].shape == array.shape, name
        assert result[name].tobytes() == array.tobytes(), name


def test_reads_what_the_safetensors_package_writes(tmp_path):
    save_file(arrays(), tmp_path / "model.safetensors")
    assert_same(Tensors(tmp_path), arrays())
    assert_same(Tensors(tmp_path / "model.safetensors"), arrays())


def test_the_safetensors_package_reads_what_we_write(tmp_path):
    tensors = arrays()
    assert write(tmp_path, specs(tensors), tensors.__getitem__) == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert_same({name: file.get_tensor(name) for name in tensors}, tensors)


def test_shards_have_an_index_and_read_back(tmp_path):
    tensors = arrays()
    files = write(tmp_path, specs(tensors), tensors.__getitem__, shard_bytes=100)
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert_same(Tensors(tmp_path), tensors)
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileError, match=f"{files[1]} is missing"):
        Tensors(tmp_path)


def test_index_and_files_must_agree(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "../up.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FileError, match=r"(?s)not a plain file name.*'b' is not in"):
        Tensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(FileError, match="not a safetensors index"):
        Tensors(tmp_path)


def test_a_name_in_two_files_is_refused(tmp_path):
    for file in ("one", "two"):
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(FileError, match="'a' is both in"):
        Tensors(tmp_path)


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "beyond": ({"a": entry([4], [0, 16])}, 8, "beyond the file"),
    "overlap": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, 12, "overlaps"),
    "hole": ({"a": entry([1], [4, 8])}, 8, "belong to no tensor"),
    "tail": ({"a": entry([1], [0, 4])}, 8, "last 4 bytes"),
    "absurd": ({"a": entry([10**10, 10**10], [0, 8])}, 8, "cannot have 8 bytes"),
    "overflow": ({"a": entry([2**62, 4], [0, 0])}, 0, "cannot have 0 bytes"),
    "negative": ({"a": entry([-1], [0, 4])}, 4, "natural numbers"),
    "fraction": ({"a": entry([1.0], [0, 4])}, 4, "natural numbers"),
    "backward": ({"a": entry([1], [4, 0])}, 4, "cannot have -4 bytes"),
    "dtype": ({"a": entry([1], [0, 4], "F33")}, 4, "unknown dtype 'F33'"),
    "lacking": ({"a": {"dtype": "F32"}}, 4, "lacks dtype, shape or data_offsets"),
    "list": ([], 0, "not an object"),
}


@pytest.mark.parametrize("name", LIES)
def test_lying_header_is_refused_at_once(tmp_path, name):
    header, size, message = LIES[name]
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    start = time.monotonic()
    with pytest.raises(FileError, match=message) as error:
        Tensors(tmp_path)
    assert time.monotonic() - start < 1
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "fewer than the 8"),
        ((10**15).to_bytes(8, "little") + b"{}", "claims 1000000000000000 bytes"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "not readable"),
        ((12).to_bytes(8, "little") + b'{"a":1,"a":2', "not readable"),
    ],
)
def test_file_that_is_no_safetensors_is_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FileError, match=message):
        Tensors(tmp_path)


def test_truncated_download_is_named(tmp_path):
    save_file(arrays(), tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 1)
    with pytest.raises(FileError, match="cut short"):
        Tensors(tmp_path)


def test_directory_without_weights_is_named(tmp_path):
    with pytest.raises(FileError, match=r"has no file \*\.safetensors or"):
        Tensors(tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        Tensors(tmp_path / "absent")


def test_new_directory_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError), new_directory(target) as directory:
        (directory / "half").write_text("half")
        raise RuntimeError("disk full")
    assert not target.exists() and not list(target.parent.iterdir())
    with new_directory(target) as directory:
        (directory / "whole").write_text("whole")
        assert not target.exists()
    assert [file.name for file in target.parent.iterdir()] == ["model"]
    assert (target / "whole").read_text() == "whole"
    with pytest.raises(FileExistsError, match="already exists"), new_directory(target):
        raise AssertionError("must not come here")
    assert (target / "whole").read_text() == "whole"


KILLED = """
import sys, time
from internvl_jax.convert.safetensors_files import new_directory
with new_directory(sys.argv[1]) as directory:
    (directory / "model.safetensors").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_killed_writer_leaves_nothing_finished_and_does_not_block_the_next(tmp_path):
    target = tmp_path / "model"
    command = [sys.executable, "-c", KILLED, str(target)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "writing\n"
        with pytest.raises(FileError, match="another process is writing"), new_directory(target):
            raise AssertionError("must not come here")
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert not target.exists()
    with new_directory(target) as directory:
        assert not list(directory.iterdir())
    assert target.is_dir() and not list(tmp_path.glob(".*"))
