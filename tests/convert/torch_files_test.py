"""Files of torch.save: read as torch reads them, lazily, and without running what they ask for."""

import importlib
import json
import os
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from internvl_jax import convert
from internvl_jax.convert.safetensors_files import FileError, Tensors
from tests.golden import cases

(LEGACY, *_) = [case for case in cases.discover() if case.category == "P"]


class Canary:
    """Unpickled as it wishes to be, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def archive(path, content, protocol=2):
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(content, protocol))
        file.writestr("archive/version", "3\n")


@pytest.mark.parametrize("name", ["model.pth", "pytorch_model.bin"])
def test_pickle_that_would_run_code_is_refused(tmp_path, name):
    trap = tmp_path / "trap"
    archive(tmp_path / name, {"weight": Canary(trap)})
    with pytest.raises(FileError, match=r"posix\.mkdir.*refused"):
        convert.load_torch_layout(tmp_path / name)
    # Not in an archive, as old versions wrote it and as attacks are written.
    (tmp_path / name).write_bytes(pickle.dumps(Canary(trap)))
    with pytest.raises(FileError, match=r"PyTorch 1\.6"):
        convert.load_torch_layout(tmp_path / name)
    assert not trap.exists()


def test_archive_without_tensors_or_cut_short_is_named(tmp_path):
    path = tmp_path / "model.pth"
    archive(path, {"epoch": 3})
    with pytest.raises(FileError, match=r"model\.pth.*no dictionary of tensors"):
        Tensors(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FileError, match=r"model\.pth"):
        Tensors(path)


@pytest.fixture
def torch():
    """For the slow tests: files that torch itself wrote."""
    return importlib.import_module("torch")


def state_of(torch):
    weights = LEGACY.weights()
    return {key: torch.from_numpy(np.array(weights[key])) for key in weights}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [None, "module"])
def test_older_model_loads_and_equals(torch, tmp_path, wrapper):
    state = state_of(torch)
    torch.save({wrapper: state} if wrapper else state, tmp_path / "model.pth")
    description = json.dumps(LEGACY.config)
    (tmp_path / "config.json").write_text(description)
    _, params = convert.load_torch_layout(tmp_path / "model.pth")
    _, expected = LEGACY.load(tmp_path / "safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.slow
def test_parameters_views_and_dtypes(torch, tmp_path):
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "part": base[6:12].view(2, 3),
        "half": base.to(torch.bfloat16),
        "parameter": torch.nn.Parameter(base.clone()),
        "count": torch.tensor(7),
    }
    torch.save(state, tmp_path / "model.pth")
    tensors = Tensors(tmp_path / "model.pth")
    np.testing.assert_array_equal(tensors["part"], np.arange(6, 12).reshape(2, 3))
    assert tensors["half"].dtype == ml_dtypes.bfloat16 and tensors["half"][3] == 3
    np.testing.assert_array_equal(tensors["parameter"], np.arange(24))
    assert tensors["count"] == 7 and tensors["count"].dtype == np.int64
    torch.save({"turned": base.view(4, 6).T}, tmp_path / "turned.pth")
    with pytest.raises(FileError, match="'turned' is a view"):
        Tensors(tmp_path / "turned.pth")


@pytest.mark.slow
def test_shards_with_an_index(torch, tmp_path):
    state = state_of(torch)
    places = {}
    for n, keys in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        file = f"pytorch_model-{n + 1:05d}-of-00002.bin"
        torch.save({key: state[key] for key in keys}, tmp_path / file)
        places |= dict.fromkeys(keys, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    tensors = Tensors(tmp_path)
    assert set(tensors) == set(state) and len(tensors.files) == 2
    for key in state:
        np.testing.assert_array_equal(tensors[key], state[key].numpy())
