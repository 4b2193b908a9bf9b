"""Every case in the directory belongs to a category that is run, and none of them is empty."""

from tests.golden import cases


def test_every_case_has_a_known_category():
    unknown = {
        case.path.name for case in cases.discover() if case.category not in cases.RUN
    }
    assert not unknown


def test_own_copy_has_cases_of_every_category(monkeypatch):
    monkeypatch.delenv("INTERNVL_GOLDEN", raising=False)
    present = {file.parent.name.split("_")[0] for file in cases.directory().glob("*/case.json")}
    assert set(cases.RUN) <= present
