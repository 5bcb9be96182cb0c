"""A company's questions about its documents: CSV, JSON lines or Excel."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hashattn.base.checks import require_one_of
from hashattn.base.errors import HashAttnError
from hashattn.base.files import parse_json
from hashattn.pilot.documents.files import read_file
from hashattn.pilot.documents.formats.reading import cleaned
from hashattn.pilot.documents.library import Library
from hashattn.pilot.documents.limits import ReadLimits
from hashattn.pilot.documents.reader import Reader
from hashattn.pilot.documents.skipped import Refused, Skipped

_FIELDS = {  # names of columns, in small letters
    "question": ("question", "questions", "質問", "質問文", "設問", "問い"),
    "answer": ("answer", "answers", "回答", "解答", "答え", "正解"),
    "document": ("document", "documents", "file", "文書", "文書名", "ファイル", "ファイル名"),
}
_FIELD = {name: field for field, names in _FIELDS.items() for name in names}
_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "txt", ".xlsx": "xlsx", ".xlsm": "xlsx"}
_SHOWN = 5  # problems that an error lists
_MOST = 10_000  # questions


class QuestionsError(HashAttnError, ValueError):
    """A file of questions cannot be read, or some of its rows cannot be used."""


@dataclass(frozen=True)
class Question:
    """A question.

    answers: that count as right, none if they are not known. document: name of the library's
    document that it is about, None if that is not said. row: in the file, as Excel counts: the
    names of the columns are row 1; of JSON lines, the line.
    """

    text: str
    answers: tuple[str, ...]
    document: str | None
    row: int


def read_questions(
    path: str | os.PathLike, library: Library, *, limits: ReadLimits | None = None
) -> tuple[Question, ...]:
    """The questions of a file, in its order.

    The first row, or the keys of each JSON object, name the columns, in any order and case, in
    English or Japanese: question (質問); answer or answers (回答), several separated by |, may be
    missing; document (文書), a name in `library`, may be missing. Other columns and empty rows are
    ignored. The encoding and, of CSV, the delimiter are found out. QuestionsError lists what is
    wrong, by row: no question, the same question twice, a document that there is not.
    """
    rows = list(_rows(path, limits or ReadLimits()))
    if len(rows) > _MOST:
        raise QuestionsError(f"{path} has {len(rows)} questions: choose {_MOST} at most")
    names = _Names(library)
    questions: list[Question] = []
    problems: list[str] = []
    first: dict[tuple[str, str | None], int] = {}  # row of each question
    for row, fields in rows:
        text, document = fields.get("question", ""), fields.get("document", "")
        if not text:
            problems.append(f"row {row} has no question: fill it in, or delete the row")
            continue
        name = names.find(document)
        if document and name is None:
            problems.append(f"row {row}: {names.problem(document)}")
            continue
        same = first.setdefault((text, name), row)
        if same != row:
            problems.append(f"row {row} asks what row {same} asks: delete one of them")
            continue
        answers = fields.get("answer", "").replace("｜", "|").split("|")
        kept = dict.fromkeys(filter(None, map(str.strip, answers)))
        questions.append(Question(text, tuple(kept), name, row))
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = "\n  ".join(problems[:_SHOWN] + more)
        raise QuestionsError(f"{path} cannot be used as it is:\n  {lines}")
    if not questions:
        raise QuestionsError(f"{path} holds no questions: add a row for each, or name no file")
    return tuple(questions)


def _rows(path: str | os.PathLike, limits: ReadLimits) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, {field: text}) of each row that is not empty."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    require_one_of("suffix of the questions' file", suffix, _SUFFIXES, QuestionsError)
    kind = _SUFFIXES[suffix]
    task = "lines" if kind == "txt" else "rows"
    try:
        with Reader(limits) as reader:
            content = read_file(path, limits.file_bytes)
            result = reader.read(task, content, kind) if content.strip() else None
    except Refused as refused:
        reason = Skipped(str(path), refused.key, refused.values).reason
        raise QuestionsError(f"{path}: {reason}") from refused
    if result is None:
        raise QuestionsError(f"{path} is empty: add a row for each question, or name no file")
    return _of_lines(result, path) if task == "lines" else _of_table(result, path)


def _of_table(rows: Sequence[Sequence[str]], path: Any) -> Iterator[tuple[int, dict[str, str]]]:
    filled = ((number, row) for number, row in enumerate(rows, 1) if any(row))
    first, names = next(filled, (1, []))
    fields = _fields(names, f"{path}, row {first}")
    for number, row in filled:
        if len(row) > len(names) and any(row[len(names) :]):
            raise QuestionsError(
                f"{path}, row {number} has more cells than row {first} has names: "
                "put texts that hold the separator in quotation marks"
            )
        yield number, {field: row[at] for field, at in fields.items() if at < len(row)}


def _of_lines(lines: Sequence[str], path: Any) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        value = parse_json(line, where, QuestionsError)
        if not isinstance(value, dict):
            raise QuestionsError(f'{where} is no object: write {{"question": "...", ...}}')
        keys = list(value)
        fields = _fields(keys, where)
        yield number, {f: _one_text(value[keys[at]], where, f) for f, at in fields.items()}


def _one_text(value: Any, where: str, field: str) -> str:
    """A JSON value as a table's cell would hold it."""
    values = value if isinstance(value, list) and field == "answer" else [value]
    if not all(isinstance(each, str | int | float | None) for each in values):
        lists = " or a list of texts" if field == "answer" else ""
        raise QuestionsError(f"{where}: the {field} must be a text{lists}")
    # cleaned: "\ud800" in JSON is half of a character
    return "|".join("" if each is None else cleaned(str(each)).strip() for each in values)


def _fields(names: Sequence[str], where: str) -> dict[str, int]:
    """{field: column}; QuestionsError if there is no question's, or two of one field."""
    fields: dict[str, int] = {}
    for column, name in enumerate(names):
        field = _FIELD.get(_plain(name))
        if field in fields:
            raise QuestionsError(f"{where} names two columns for the {field}: delete one of them")
        if field:
            fields[field] = column
    if "question" not in fields:
        found = ", ".join(filter(None, names)) or "nothing"
        raise QuestionsError(
            f"{where} has no column named question (質問); it has: {found[:200]}. Name the columns "
            "question, answer, document, the last two as you need them"
        )
    return fields


def _plain(name: str) -> str:
    """A name as it is compared: macOS decomposes kana, Excel users type wide or capital letters."""
    return unicodedata.normalize("NFKC", name).strip().casefold()


class _Names:
    """Finds the library's document that a person means."""

    def __init__(self, library: Library) -> None:
        self._skipped = {_plain(each.name): each for each in library.skipped}
        self._names: dict[str, list[str]] = {}
        for document in library.documents:
            plain = _plain(document.name)
            for key in {plain, plain.rpartition("/")[2]}:  # folders may be left out
                self._names.setdefault(key, []).append(document.name)

    def find(self, name: str) -> str | None:
        """The document's name, None if none or several may be meant."""
        for key in (_plain(name), _plain(name.replace("\\", "/"))):
            found = self._names.get(key, [])
            exact = [each for each in found if _plain(each) == key]
            for names in (exact, found):
                if len(names) == 1:
                    return names[0]
        return None

    def problem(self, name: str) -> str:
        """Why there is no such document."""
        key = _plain(name)
        if several := self._names.get(key):
            return f"{name!r} may be {' or '.join(several[:3])}: give the folder too"
        if key in self._skipped:
            return f"document {name!r} was not read. {self._skipped[key].reason}"
        near = difflib.get_close_matches(key, self._names, n=3, cutoff=0.5)
        names = [each for plain in near for each in self._names[plain]]
        hint = f"did you mean {', '.join(dict.fromkeys(names))}?" if names else "give a file's name"
        return f"there is no document {name!r}: {hint}"
