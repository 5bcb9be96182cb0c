"""What is left out because it passed with the same sources, and when nothing is."""

import json

import pytest

import settled
from settled import ROOT, closure, forget, key

MODULE = "tests/m.py"
LONG = [(MODULE, f"f[{case}]", False) for case in "abc"]
SHORT = [(MODULE, "f[short]", False), (MODULE, "g", False)]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """stored(key): a report of that key in which cases a, b and c of f, and h, are long."""
    monkeypatch.setattr(settled, "key", lambda module: "now")

    def write(of, **changed):
        path = tmp_path / "settled_tests.json"
        seconds = {name: 9.0 - place for place, (_, name, _) in enumerate(LONG)} | {"h": 9.0}
        entry = {"key": of, "seconds": seconds}
        environment = settled.environment() | changed
        path.write_text(json.dumps({"environment": environment, "modules": {MODULE: entry}}))
        return path

    return write


def left_out(tests, report):
    assert {module for module, _ in settled.settled(tests, report)} <= {MODULE}
    return {name for _, name in settled.settled(tests, report)}


def test_long_cases_are_left_out_but_the_shortest_of_each_function(stored):
    report = stored("now")
    assert left_out(LONG + SHORT, report) == {"f[a]", "f[b]", "f[c]"}
    assert left_out(LONG, report) == {"f[a]", "f[b]"}
    assert left_out([(MODULE, "f[new]", False), LONG[0]], report) == {"f[a]"}
    assert left_out([(MODULE, "h", False)], report) == {"h"}  # other tests of the module run
    assert left_out([("tests/other.py", "h", False)], report) == set()


def test_what_is_marked_is_left_out_whatever_it_took(stored):
    report = stored("now")
    assert left_out([(MODULE, "g", True), *SHORT], report) == {"g"}
    cases = [(MODULE, f"k[{i}]", i > 0) for i in range(3)]
    assert left_out(cases, report) == {"k[1]", "k[2]"}
    marked = [(module, name, True) for module, name, _ in LONG]
    assert left_out(marked, report) == {"f[a]", "f[b]", "f[c]"}


def test_other_sources_or_versions_leave_nothing_out(stored, tmp_path):
    marked = [(MODULE, "h", True)]
    assert left_out(LONG + SHORT + marked, stored("before")) == set()
    assert left_out(LONG + SHORT + marked, stored("now", torch="0.0")) == set()
    assert left_out(LONG + SHORT + marked, tmp_path / "missing.json") == set()


@pytest.fixture
def repository(tmp_path):
    """A test of a package whose parts are imported in each way that there is."""
    files = {
        "tests/conftest.py": "import helpers\n",
        "tests/helpers.py": "",
        "tests/unused.py": "",
        "tests/models/test_a.py": "from hashattn.low import one\nfrom near import x\n",
        "tests/models/near.py": "x = 1\n",
        "hashattn/__init__.py": "",
        "hashattn/low/__init__.py": 'LAZY = "hashattn.named"\n',
        "hashattn/low/one.py": "def f():\n    import hashattn.inner\n",
        "hashattn/low/unused.py": "",
        "hashattn/named.py": "import hashattn_kernels\n",
        "hashattn/inner.py": "",
        "kernels/hashattn_kernels/__init__.py": "",
        "kernels/hashattn_kernels/codes.py": "",
        "kernels/hashattn_kernels/gpu/api.py": "",
        "data/profiles/tiny.yaml": "steps: 2",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path, [name for name in files if "unused" not in name]


def test_the_key_is_of_everything_that_is_imported_or_named(repository):
    root, used = repository
    reached = closure(root / "tests/models/test_a.py", root)
    assert reached == {root / name for name in used if name.endswith(".py")}
    before = key("tests/models/test_a.py", root)
    for name in [*used, "tests/unused.py", "hashattn/low/unused.py"]:
        path, text = root / name, (root / name).read_text()
        path.write_text(text + "# changed\n")
        forget()
        assert (key("tests/models/test_a.py", root) != before) == (name in used), name
        path.write_text(text)
    forget()
    assert key("tests/models/test_a.py", root) == before


def test_the_closures_of_real_tests():
    """Files that a test reaches through a registry of names, a helper, a script in a string."""
    reached = {path.relative_to(ROOT).as_posix() for path in
               closure(ROOT / "tests/base/engines/test_engines.py")}  # fmt: skip
    assert {"hashattn/base/engines/on_ray.py", "hashattn/selectors/quest.py", "tests/helpers.py",
            "kernels/hashattn_kernels/numba_cpu/selection.py", "tests/evaluation/test_parallel.py",
            "hashattn/evaluation/runner.py", "hashattn/hashing/train.py"} <= reached  # fmt: skip
    assert not any(name.startswith("hashattn/reproduce/notebooks") for name in reached)
    assert not {"tests/settled.py", "tests/test_readme.py"} & reached


def test_only_modules_whose_outcome_files_decide_are_recorded():
    """Those that read documents, notebooks or what is installed always run."""
    may = set(settled.modules())
    assert "tests/kernels/test_attend.py" in may and "tests/base/engines/test_engines.py" in may
    always = {"tests/test_readme.py", "tests/test_packaging.py", settled.ELSEWHERE}
    assert not may & always and all((ROOT / name).is_file() for name in always)
    assert set(settled.read()) <= may
