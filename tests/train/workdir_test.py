"""The work directory: writable, held by one run, of one experiment. See also faults_test."""

import json
import os

import pytest

from internvl_jax.train import workdir

CONFIG = {"seed": 0, "model": {"size": "tiny", "depth": 2}, "data": {"task": "a"}, "steps": 4}


def test_opening_creates_it_and_leaves_no_probe(tmp_path):
    with workdir.opened(tmp_path / "a" / "b") as path:
        assert json.loads((path / "lock").read_text())["pid"] == os.getpid()
        assert [p.name for p in path.iterdir()] == ["lock"]
    assert (path / "lock").read_text() == ""


def test_a_place_that_cannot_be_a_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(workdir.WorkdirError, match=r"cannot write in work directory .*file/run"),
        workdir.opened(tmp_path / "file" / "run"),
    ):
        pass


def test_the_same_directory_opens_once(tmp_path):
    with (
        workdir.opened(tmp_path),
        pytest.raises(workdir.WorkdirError, match=f"in use by process {os.getpid()} on "),
        workdir.opened(tmp_path),
    ):
        pass
    with workdir.opened(tmp_path):
        pass


def test_what_a_dead_run_left_is_taken_over_with_a_note(tmp_path, capsys):
    holder = {"host": os.uname().nodename, "pid": 999999}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with workdir.opened(tmp_path):
        pass
    assert "taking over" in capsys.readouterr().err


def test_a_holder_on_another_machine_is_believed(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with (
        pytest.raises(workdir.WorkdirError, match=r"process 1 on elsewhere.*delete"),
        workdir.opened(tmp_path),
    ):
        pass


def test_differences_of_nested_values():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    new = {"a": {"b": 2, "c": [1, 2], "e": 0}, "d": {"f": 1}}
    assert workdir.differences(old, new) == {
        "a.b": (1, 2),
        "a.e": (None, 0),
        "d": ("x", {"f": 1}),
    }
    assert workdir.differences(old, old) == {}


def test_claim_prints_what_may_change_and_refuses_what_may_not(tmp_path, capsys):
    workdir.claim(tmp_path, CONFIG, "abc", resuming=False)
    workdir.claim(tmp_path, {**CONFIG, "steps": 9}, "abc", resuming=True)
    assert "config changed on resume: steps: 4 → 9" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 9

    deeper = {**CONFIG, "model": {"size": "tiny", "depth": 3}}
    with pytest.raises(workdir.WorkdirError, match=r"model\.depth: 2 → 3.*init_from"):
        workdir.claim(tmp_path, deeper, "abc", resuming=True)
    with pytest.raises(workdir.WorkdirError, match="seed: 0 → 1"):
        workdir.claim(tmp_path, {**CONFIG, "seed": 1}, "abc", resuming=True)
    other = {**CONFIG, "data": {"task": "b"}}
    with pytest.raises(workdir.WorkdirError, match=r"data\.task: 'a' → 'b' \(fingerprint abc → x"):
        workdir.claim(tmp_path, other, "xyz", resuming=True)
    with pytest.raises(workdir.WorkdirError, match="the same config now reads other records"):
        workdir.claim(tmp_path, {**CONFIG, "steps": 9}, "xyz", resuming=True)
    assert json.loads((tmp_path / "data.json").read_text()) == {"fingerprint": "abc"}


def test_before_the_first_checkpoint_anything_may_change(tmp_path):
    workdir.claim(tmp_path, CONFIG, "abc", resuming=False)
    workdir.claim(tmp_path, {**CONFIG, "seed": 5}, "xyz", resuming=False)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5


def test_a_damaged_config_file_is_reported_and_replaced(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"seed"')
    workdir.claim(tmp_path, CONFIG, "abc", resuming=True)
    assert "config.json is damaged" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_what_differs_in_the_data_is_shown(tmp_path):
    content = {"settings": {"seed": 1}, "sources": {"0": ["webdataset a 5", 1.0]}}
    workdir.claim(tmp_path, {}, "abc", resuming=False, data_content=content)
    changed = {**content, "sources": {"0": ["webdataset a 6", 1.0]}}
    with pytest.raises(workdir.WorkdirError, match=r"sources\.0: .*a 5.* → .*a 6"):
        workdir.claim(tmp_path, {}, "abd", resuming=True, data_content=changed)
