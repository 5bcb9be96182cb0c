"""What is left out because it passed with the same sources, and when nothing is."""

import json
import shutil

import pytest
import settled
from settled import ROOT, SOURCES, key, name_of

LONG = [f"m::f[{case}]" for case in "abc"]
SHORT = ["m::f[short]", "m::g"]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """stored(key): a report of that key in which cases a, b and c of f and all of g are long."""
    monkeypatch.setattr(settled, "key", lambda: {"sources": "now"})

    def write(of):
        path = tmp_path / "kernel_tests.json"
        seconds = {name: 3.0 - place for place, name in enumerate(LONG)} | {"m::g": 9.0}
        path.write_text(json.dumps({"key": of, "seconds": seconds}))
        return path

    return write


def test_long_cases_are_left_out_but_the_shortest_of_each_function(stored):
    report = stored({"sources": "now"})
    assert settled.settled(LONG + SHORT, report) == set(LONG)  # g has one case: it runs
    assert settled.settled(LONG, report) == set(LONG[:2])
    assert settled.settled(["m::f[new]", *LONG[:1]], report) == {LONG[0]}


def test_other_sources_leave_nothing_out(stored):
    assert settled.settled(LONG + SHORT, stored({"sources": "before"})) == set()


def test_the_key_is_of_every_source_and_compiler(tmp_path, monkeypatch):
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    before = key()
    assert key(tmp_path) == before
    for name in ("kernels/hashattn_kernels/triton_gpu/bits.py", "tests/kernels/test_attend.py",
                 "kernels/hashattn_kernels/reference.py", "tests/kernel_inputs.py"):  # fmt: skip
        path = tmp_path / name
        content = path.read_text()
        path.write_text(content + "#")
        assert key(tmp_path) != before, name
        path.write_text(content)
    monkeypatch.setattr(settled, "version", lambda name: "0.0")
    assert key(tmp_path)["sources"] == before["sources"] and key(tmp_path) != before


def test_names_are_those_of_junit_reports():
    nodeid = "tests/kernels/gpu/test_triton_step.py::test_steps[union: True]"
    assert name_of(nodeid) == "tests.kernels.gpu.test_triton_step::test_steps[union: True]"


def test_the_committed_report_is_of_these_sources():
    """Where this fails, `make gate` after the last change of a kernel or of its tests."""
    assert json.loads(settled.REPORT.read_text())["key"]["sources"] == key()["sources"]
