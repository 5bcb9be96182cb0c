"""Records in LongBench's format: one JSON object a line, one question about one long context."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hashattn.base.checks import is_count, is_text, require
from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_json_lines, write_text


class RecordError(HashAttnError, ValueError):
    """A file or a record is not in LongBench's format."""


@dataclass(frozen=True)
class Record:
    """One LongBench record (THUDM/LongBench): question `input` about `context`, accepted `answers`.

    length: LongBench's own count (words or characters), as in its file. all_classes: the labels of
    a classification task, else None. Raises RecordError naming the field, its value and what it
    must be.
    """

    input: str
    context: str
    answers: tuple[str, ...]
    length: int = 0
    dataset: str = ""
    language: str = "en"
    all_classes: tuple[str, ...] | None = None
    _id: str = ""

    def __post_init__(self) -> None:
        for name in ("input", "context", "dataset", "language", "_id"):
            value = getattr(self, name)
            require(is_text(value, empty=True), name, value, "a text", RecordError)
        for name, optional in (("answers", False), ("all_classes", True)):
            value = getattr(self, name)
            valid = isinstance(value, list | tuple) and all(is_text(v, empty=True) for v in value)
            allowed = "a list of texts" + optional * ", or null"
            require(valid or (optional and value is None), name, value, allowed, RecordError)
            object.__setattr__(self, name, None if value is None else tuple(value))
        require(is_count(self.length, 0), "length", self.length, "an integer of at least 0",
                RecordError)  # fmt: skip
        allowed = f"at least one text in record {self._id!r}"
        require(len(self.answers) > 0, "answers", self.answers, allowed, RecordError)

    def to_dict(self) -> dict[str, Any]:
        """LongBench's JSON object."""
        lists = {"answers": list(self.answers)}
        if self.all_classes is not None:
            lists["all_classes"] = list(self.all_classes)
        return asdict(self) | lists


FIELDS = tuple(Record.__dataclass_fields__)
REQUIRED = ("input", "context", "answers")


def record_from_dict(values: dict[str, Any]) -> Record:
    """A Record from LongBench's JSON object; RecordError names the missing or wrong field."""
    allowed = f"a JSON object of {list(FIELDS)}"
    require(isinstance(values, dict), "record", values, allowed, RecordError)
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise RecordError(f"record lacks {missing}; LongBench records hold {list(FIELDS)}")
    return Record(**{name: values[name] for name in FIELDS if name in values})


def load_records(path: str | Path, limit: int | None = None) -> list[Record]:
    """The records of a .jsonl file, in order, at most `limit` of them.

    Raises RecordError, with file and line, for a missing file or a line that is no record.
    """
    path = Path(path)
    if not path.exists():
        raise RecordError(f"no records at {path}; give the path of a LongBench-format .jsonl file")
    records = parsed_lines(path, limit, lambda values, _: record_from_dict(values), RecordError)
    if not records and limit != 0:
        raise RecordError(f"{path} holds no records")
    return records


def parsed_lines(
    path: Path, limit: int | None, parse: Callable[[Any, str], Record], error: type[HashAttnError]
) -> list[Record]:
    """The first `limit` records of a .jsonl file: parse(value, "file:line") of each line that is
    not empty. What parse raises becomes `error`, with file and line before it."""
    records: list[Record] = []
    lines = read_json_lines(path, error)
    while limit is None or len(records) < limit:
        where, value = next(lines, (None, None))
        if where is None:
            break
        try:
            records.append(parse(value, where))
        except HashAttnError as problem:
            raise error(f"{where}: {problem}") from problem
    return records


def save_records(records: Iterable[Record], path: str | Path) -> None:
    """Writes the records as .jsonl; the file appears whole or not at all."""
    write_text(path, "".join(json.dumps(r.to_dict(), ensure_ascii=False) + "\n" for r in records))


def group_by_context(records: Iterable[Record]) -> list[list[Record]]:
    """Records grouped by context; groups and their members keep the order of the records."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.context, []).append(record)
    return list(groups.values())
