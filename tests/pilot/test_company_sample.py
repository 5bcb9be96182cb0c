"""The sample company of data/company: its files, its questions, and what its card says of them."""

import csv
import re
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "data" / "company"
DOCUMENTS = FOLDER / "documents"
JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
PLAIN = {".txt", ".md", ".csv"}


def files():
    return sorted(path for path in DOCUMENTS.rglob("*") if path.is_file())


def names():
    return [path.relative_to(DOCUMENTS).as_posix() for path in files()]


def rows():
    with open(FOLDER / "questions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def card():
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def strange(text):
    """Characters that are no text: controls, formats, private ones, and those lost in decoding."""
    kinds = {"Cc", "Cf", "Co", "Cs", "Cn"}
    return {c for c in text if unicodedata.category(c) in kinds and c not in "\n\t"} | (
        {"\ufffd"} & set(text)
    )


def test_kinds_and_number_of_documents_are_those_of_the_card():
    kinds = Counter(path.suffix[1:] for path in files())
    assert {"txt", "md", "csv"} <= set(kinds)
    assert kinds["docx"] >= 5 and kinds["pdf"] >= 5
    said = re.search(r"\*\*(\d+) documents\*\* \((.+?)\)", card())
    assert int(said[1]) == len(files())
    assert {kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", said[2])} == kinds


def test_names_have_spaces_and_japanese_characters_in_one_form():
    assert sum(" " in name for name in names()) >= 3
    assert sum(bool(JAPANESE.search(name)) for name in names()) >= 5
    assert all(unicodedata.is_normalized("NFC", name) for name in names())  # as git keeps them


def test_plain_files_are_utf_8_with_unix_line_ends():
    for path in [*(path for path in files() if path.suffix in PLAIN), FOLDER / "questions.csv"]:
        text = path.read_bytes().decode("utf-8")
        assert not strange(text), path
        assert text.endswith("\n") and not text.endswith("\n\n"), path


def test_it_is_small():
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 330_000
    assert max(sizes.values()) <= 16_384


def test_office_and_pdf_files_tell_nothing_of_who_made_them_when_and_where():
    for path in files():
        if path.suffix == ".docx":
            with zipfile.ZipFile(path) as archive:
                assert {item.date_time for item in archive.infolist()} == {(2026, 6, 1, 0, 0, 0)}
                core = archive.read("docProps/core.xml").decode()
            dates = set(re.findall(r"\d{4}-\d\d-\d\dT[\d:]+Z", core))
            assert dates == {"2026-06-01T00:00:00Z"}
            assert "<dc:creator>Quillmere Coldchain</dc:creator>" in core
            assert re.search(r"<cp:lastModifiedBy\s*/>|<cp:lastModifiedBy></", core)
        elif path.suffix == ".pdf":
            content = path.read_bytes()
            dates = set(re.findall(rb"/(?:Creation|Mod)Date \(D:(\d{8})", content))
            assert dates == {b"20260601"}
            assert b"/Author (Quillmere Coldchain)" in content
            assert not re.search(rb"/home/|/work/|/tmp/|file:", content)


def test_questions_are_forty_in_two_languages_about_many_documents():
    questions = rows()
    assert list(questions[0]) == ["question", "answer", "document"]
    japanese = sum(bool(JAPANESE.search(row["question"])) for row in questions)
    assert (len(questions) - japanese, japanese) == (24, 16)
    assert len({row["question"] for row in questions}) == 40
    assert len({row["document"] for row in questions}) >= 14
    for row in questions:
        assert row["document"] in names()
        assert row["document"].startswith("japan/") == bool(JAPANESE.search(row["question"]))
        answers = row["answer"].split("|")
        assert all(answer == answer.strip() != "" for answer in answers)
        assert max(map(len, answers)) <= 24
        assert not any(answer in row["question"] for answer in answers)


def test_the_card_names_licence_and_limits():
    assert "**Licence**: Apache-2.0, as the repository" in card()
    assert "**Limits**" in card()
    index = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert "(company/README.md)" in index


@pytest.fixture(scope="module")
def library():
    """The folder as the pilot reads it."""
    for package in ("hashattn.pilot.documents", "mammoth", "pypdfium2"):
        pytest.importorskip(package)
    from hashattn.pilot.documents import read_documents

    return read_documents(DOCUMENTS)


def test_every_document_is_read_and_none_is_garbled(library):
    assert not library.skipped
    assert sorted(document.name for document in library.documents) == sorted(names())
    for document in library.documents:
        assert not strange(document.text), document.name
        assert 2_000 <= len(document.text.encode()) <= 16_384, document.name


def test_bytes_of_text_by_language_are_those_of_the_card(library):
    size = {"english": 0, "japanese": 0, "records": 0}
    for document in library.documents:
        count = len(document.text.encode())
        size["japanese" if document.name.startswith("japan/") else "english"] += count
        size["records"] += count * bool(re.search("^logs/|巡回点検記録", document.name))
    total = size["english"] + size["japanese"]
    assert 170_000 <= total <= 220_000
    assert 0.35 <= size["japanese"] / total <= 0.45
    assert size["records"] <= total / 4
    said = re.search(r"(\d+) KB of text: (\d+) English, (\d+) Japanese; (\d+) of them\s", card())
    counts = (total, size["english"], size["japanese"], size["records"])
    for stated, count in zip(map(int, said.groups()), counts, strict=True):
        assert abs(stated - count / 1000) <= 1  # readers differ in line ends


def test_no_paragraph_stands_twice(library):
    paragraphs = Counter(
        line
        for document in library.documents
        for line in document.text.split("\n")
        if len(line.encode()) >= 120
    )
    assert not [line for line, count in paragraphs.items() if count > 1]


def test_each_answer_stands_in_its_document_and_in_no_other(library):
    from hashattn.pilot.documents import read_questions

    texts = {document.name: document.text for document in library.documents}
    questions = read_questions(FOLDER / "questions.csv", library)
    assert [question.text for question in questions] == [row["question"] for row in rows()]
    thirds = Counter()
    for question in questions:
        first, *others = question.answers  # the others are further ways to write it
        own = texts[question.document]
        assert first in own, question.text
        thirds[int(3 * own.index(first) / len(own))] += 1
        for name, text in texts.items():
            if name != question.document:
                assert not any(answer in text for answer in (first, *others)), (first, name)
    assert all(thirds[third] >= 8 for third in range(3)), thirds
