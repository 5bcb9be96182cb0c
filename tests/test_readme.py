"""The README: each snippet runs alone, commands exist, nothing is to be installed from an index."""

import re
import subprocess

import pytest

from hashattn.reproduce.profiles import repository

ROOT = repository()
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
FROM_AN_INDEX = re.compile(r"pip3? install[^\n`]*(?<![\w./-])hashattn(?![\w/.-])")


def names(snippet):
    """A snippet by the last function it imports, for the test's name."""
    return re.findall(r"^from (\S+) import", snippet, flags=re.MULTILINE)[-1]


@pytest.mark.parametrize("snippet", PYTHON, ids=names)
def test_a_snippet_runs_alone(snippet, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def test_there_is_a_snippet_for_each_use():
    for use in ("attach(", "train_hash_weights(", "evaluate(", "select_by_codes("):
        assert any(use in snippet for snippet in PYTHON), use
    assert "Maps(" in next(snippet for snippet in PYTHON if "select_by_codes(" in snippet)


def test_make_has_every_target_that_is_named():
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT + "".join(SHELL), flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert {"reproduce", "test", "setup"} <= named
    assert named <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        ("pip install hashattn", True),
        ("pip install 'hashattn[cpu]'", True),
        ("pip3 install --upgrade hashattn", True),
        ("pip install -e '.[cpu]' in its repository", False),
        ("pip install dist/hashattn-0.1.0-py3-none-any.whl", False),
        ("pip install -e .", False),
    ],
)
def test_installing_from_an_index_is_recognised(line, asks):
    assert bool(FROM_AN_INDEX.search(line)) == asks


def test_nothing_says_to_install_from_an_index():
    """No index has the package: every install instruction names the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.ipynb", "*.yaml"], cwd=ROOT, capture_output=True,
        text=True,
    ).stdout.split("\n")  # fmt: skip
    files = [ROOT / name for name in listed if name] or [ROOT / "README.md"]
    wrong = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path.name != "test_readme.py" and path.is_file()
        for match in [FROM_AN_INDEX.search(path.read_text(encoding="utf-8"))]
        if match
    ]
    assert wrong == []


def test_the_first_action_and_the_picture_come_before_the_long_command():
    picture = re.search(r"!\[.+?\]\((\S+?)\)", TEXT)
    assert picture.start() < TEXT.index("```python") < TEXT.index("make reproduce ")
    assert (ROOT / picture[1]).stat().st_size < 150_000
    assert len(TEXT[: TEXT.index("make reproduce ")].splitlines()) < 50


@pytest.mark.parametrize(
    ("word", "definition"),
    [
        ("pivotal", "*pivotal* tokens"),
        ("receipt", "the receipt: what was really read"),
        ("graded", 'weighs ("grades") the query'),
        ("density", "a *density* of"),
        ("setup B", "setup B (the context is read dense"),
        ("setup A", "in setup A the answer alone is sparse"),
        ("racle", "*Oracle top-k* reads"),
        ("sink + local", "*sink + local* reads the first"),
    ],
)
def test_a_word_is_defined_where_it_is_first_used(word, definition):
    prose = re.sub(r"\(notebooks/\S+\)|density=1 / 8", "", TEXT)
    line = prose[: prose.index(definition)].count("\n")
    assert word not in "\n".join(prose.split("\n")[:line])
