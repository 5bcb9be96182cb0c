"""Committed notebooks are fit for nbval and for reading; nbval itself runs beside these tests."""

import nbformat
import pytest

from hashattn.reproduce.notebooks.fingerprint import notebook_source
from hashattn.reproduce.notebooks.hygiene import problems
from hashattn.reproduce.notebooks.store import tidy
from hashattn.reproduce.profiles import repository

NOTEBOOKS = sorted((repository() / "notebooks").glob("*.ipynb"))


def test_notebooks_are_numbered_from_00_without_gaps():
    numbers = [path.name[:3] for path in NOTEBOOKS]
    assert numbers == [f"{i:02d}_" for i in range(max(5, len(NOTEBOOKS)))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    assert problems(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_tidied(path):
    text = path.read_text(encoding="utf-8")
    assert text == nbformat.writes(tidy(nbformat.reads(text, as_version=4))) + "\n", "make store"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_checks_its_claims(path):
    code = notebook_source(path, code_only=True)
    assert f'Claims(\\"{path.stem}\\"' in code and ".verdict()" in code
