"""Whole conversions through the command: bytes there and back, bad input, processes killed."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from internvl_jax import cli, conversion, convert, loading
from internvl_jax.convert.mapping import MappingError
from internvl_jax.convert.safetensors_files import Tensors
from internvl_jax.models import VisionConfig
from internvl_jax.models.config import INTERNVLS, VITS
from internvl_jax.rules import flatten, unflatten
from internvl_jax.train import pretrained, streaming
from internvl_jax.train.checkpoint import CheckpointCorrupt

ROOT = Path(__file__).resolve().parent.parent
TOWER = VisionConfig(replace(VITS["tiny"], patch_size=14, image_size=56, qkv_bias=True))
CONTRASTIVE = replace(INTERNVLS["tiny"], num_queries=0, vit=TOWER.vit)
MODELS = {
    "internvl-14b": INTERNVLS["tiny"],
    "internvit": TOWER,
    "internvl-c-legacy": CONTRASTIVE,
}


def random_params(config, seed=0):
    """Random float32 parameters, without compiling the model's own initialisation."""
    rng = np.random.default_rng(seed)
    shapes = convert.layouts.parameter_shapes(config)
    return unflatten({p: rng.standard_normal(s.shape, np.float32) for p, s in shapes.items()})


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """{layout: folder} of random bfloat16 models, each with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("official")
    for number, (layout, config) in enumerate(MODELS.items()):
        params = random_params(config, number)
        convert.export(params, config, folder / layout, layout, dtype="bfloat16")
        (folder / layout / "tokenizer_config.json").write_text("{}")
    return {layout: folder / layout for layout in MODELS}


def run(*words):
    cli.main(["convert", *map(str, words)])


def fails(capsys, *words) -> str:
    """The message of a conversion that ends with code 1."""
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


def assert_same_tensors(first, second):
    first, second = Tensors(first), Tensors(second)
    assert first.specs == second.specs
    for key in first:
        assert first[key].tobytes() == second[key].tobytes(), key


@pytest.mark.parametrize("layout", MODELS)
def test_official_to_ours_and_back_is_byte_identical(layout, official, tmp_path):
    run(official[layout], tmp_path / "ours", "--layout=jax")
    run(tmp_path / "ours", tmp_path / "back", f"--layout={layout}")
    assert_same_tensors(tmp_path / "back", official[layout])
    for folder in ("ours", "back"):
        assert (tmp_path / folder / "tokenizer_config.json").read_text() == "{}"
        card = (tmp_path / folder / "README.md").read_text()
        parameters = sum(leaf.size for leaf in Tensors(official[layout]).values())
        assert f"| {parameters:,} |" in card and "bfloat16" in card
    same = json.loads((official[layout] / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == same


def test_ours_is_a_checkpoint_like_any_other(official, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 4096)  # several chunks and pieces per array
    run(official["internvl-14b"], tmp_path / "ours", "--layout=jax", "--dtype=float32")
    config, expected = convert.load_torch_layout(official["internvl-14b"], "float32")
    params, _ = pretrained.read_params(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert loading.load(tmp_path / "ours").config == config
    chunks = (tmp_path / "ours" / "params").glob("*/[0-9]*")
    assert max(file.stat().st_size for file in chunks) <= 4096


def test_checkpoints_of_a_run_are_converted_with_dtype(tmp_path):
    config = INTERNVLS["tiny"]
    params = random_params(config)
    params = jax.tree.map(jax.numpy.asarray, params)
    model = {"family": "internvl", "size": "tiny"}
    step = tmp_path / "run" / "checkpoints" / "7"
    pretrained.save_params(step, params, config={"model": model, "data": {"tokenizer": ""}})
    run(tmp_path / "run", tmp_path / "half", "--layout=internvl-14b", "--dtype=bfloat16")
    convert.export(params, config, tmp_path / "expected", dtype="bfloat16")
    assert_same_tensors(tmp_path / "half", tmp_path / "expected")
    run(tmp_path / "run", tmp_path / "lean", "--layout=jax", "--dtype=bfloat16")
    read, _ = pretrained.read_params(tmp_path / "lean")
    for path, leaf in flatten(read).items():
        original = np.asarray(flatten(params)[path]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(leaf, original)


def test_official_layouts_convert_into_one_another(official, tmp_path):
    run(official["internvit"], tmp_path / "legacy", "--layout=internvl-c-legacy")
    assert "cls_token" in Tensors(tmp_path / "legacy")
    run(tmp_path / "legacy", tmp_path / "back", "--layout=internvit")
    assert_same_tensors(tmp_path / "back", official["internvit"])


def test_inspect_says_what_would_happen_and_writes_nothing(official, tmp_path, capsys):
    folder = tmp_path / "source"
    folder.mkdir()
    source = official["internvl-c-legacy"]
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    buffer = "transformer.layers.1.self_attn.rotary_emb.inv_freq"
    save_file({buffer: np.ones(3, np.float32)}, folder / "buffers.safetensors")
    run(folder, tmp_path / "target", "--layout=jax", "--dtype=float32", "--inspect")
    printed = capsys.readouterr().out
    leaves = list(flatten(random_params(CONTRASTIVE)).values())
    parameters = sum(leaf.size for leaf in leaves)
    for words in (
        "layout internvl-c-legacy, 2 file(s)",
        "layout jax, float32",
        f"tensors     {len(leaves)}\n",
        f"parameters  {parameters:,}\n",
        f"size        {4 * parameters / 1e9:.3f} GB",
        "memory      about 0.",
        "beside      tokenizer_config.json",
        f"no place    1 key(s)\n    {buffer}",
    ):
        assert words in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def damaged(source, folder):
    folder.mkdir()
    tensors = {key: np.array(array) for key, array in Tensors(source).items()}
    del tensors["vision_model.encoder.layers.1.ls1"]
    tensors["itm_head.bias"] = np.zeros(3, np.float32)
    tensors["stranger"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("more", [(), ("--inspect",)])
def test_keys_that_do_not_fit_are_listed_together(official, tmp_path, capsys, more):
    source = damaged(official["internvl-14b"], tmp_path / "damaged")
    message = fails(capsys, source, tmp_path / "target", "--layout=jax", *more)
    assert "missing (1):\n    vision_model.encoder.layers.{i}.ls1   i = 1" in message
    assert "unexpected (1):\n    stranger" in message
    assert "itm_head.bias: has (3,), needs (2,)" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


def test_a_lying_header_is_an_error_at_once(official, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((official["internvit"] / "config.json").read_bytes())
    header = {"a": {"dtype": "F32", "shape": [10**6, 10**5], "data_offsets": [0, 4 * 10**11]}}
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    start = time.monotonic()
    message = fails(capsys, source, tmp_path / "target", "--layout=jax")
    assert time.monotonic() - start < 1
    assert "beyond the file" in message and message.count("\n") == 1
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("nowhere", ("--layout=jax",), "there is no"),
        ("internvit", ("--layout=onnx",), "choose from jax, internvl-14b, "),
        ("internvit", ("--layout=internvl-14b",), "VisionModel|Vision"),
        ("internvit", ("--layout=jax", "--dtype=int8"), "choose bfloat16, float16 or float32"),
        ("internvit", ("--layout=jax", "--dtype=half-ish"), "choose bfloat16"),
    ],
)
def test_what_cannot_be_converted_is_said(official, tmp_path, capsys, source, words, message):
    path = official.get(source, tmp_path / source)
    printed = fails(capsys, path, tmp_path / "target", *words)
    assert any(part in printed for part in message.split("|"))
    assert not any(tmp_path.iterdir())


def test_an_existing_target_is_left_alone(official, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("mine")
    message = fails(capsys, official["internvit"], tmp_path / "target", "--layout=jax")
    assert "already exists" in message
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["mine"]


def test_a_flipped_bit_in_our_checkpoint_stops_the_export(official, tmp_path):
    run(official["internvl-14b"], tmp_path / "ours", "--layout=jax")
    file = max((tmp_path / "ours" / "params").rglob("*"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    planned = conversion.plan(tmp_path / "ours", "internvl-14b")
    with pytest.raises(CheckpointCorrupt, match=file.parent.name.replace(".", "/")):
        planned.write(tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_parameters_that_a_layout_lacks_are_listed(tmp_path):
    params = random_params(TOWER)
    params = jax.tree.map(jax.numpy.asarray, params | {"stranger": np.zeros(3, np.float32)})
    meta = {"model": {"class": "VisionConfig", "vit": VITS_TINY}, "data": {}}
    pretrained.save_params(tmp_path / "ours", params, config=meta)
    with pytest.raises(MappingError, match="stranger"):
        conversion.plan(tmp_path / "ours", "internvit")


VITS_TINY = {
    "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "patch_size": 14, "image_size": 56,
    "qkv_bias": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 200 MB in both kinds, whose conversion takes a while."""
    folder = tmp_path_factory.mktemp("large")
    tower = replace(TOWER.vit, width=512, depth=16, num_heads=8, mlp_dim=2048)
    config = VisionConfig(tower)
    convert.export(random_params(config), config, folder / "official", "internvit")
    conversion.plan(folder / "official", "jax").write(folder / "ours")
    return folder


@pytest.mark.parametrize(
    ("kill", "source", "layout"),
    [
        (signal.SIGKILL, "official", "jax"),
        (signal.SIGTERM, "ours", "internvit"),
        pytest.param(signal.SIGTERM, "official", "jax", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "ours", "internvit", marks=pytest.mark.slow),
    ],
)
def test_a_killed_conversion_leaves_nothing_finished_and_runs_again(
    large, tmp_path, kill, source, layout
):
    target, partial = tmp_path / "target", tmp_path / ".target.partial"
    words = [sys.executable, "-m", "internvl_jax.cli", "convert", str(large / source), str(target)]
    words.append(f"--layout={layout}")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (partial.is_dir() and _size(partial) > 4_000_000):  # in the midst of the weights
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(kill)
    process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[kill]
    assert not target.exists()
    assert partial.exists() == (kill == signal.SIGKILL)
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    if layout == "internvit":
        assert_same_tensors(target, large / "official")
    else:
        pretrained.read_params(target)  # which verifies every array


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total
