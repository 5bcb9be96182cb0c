"""Records in LongBench's format: one JSON object a line, one question about one long context."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hashattn.errors import HashAttnError


class RecordError(HashAttnError, ValueError):
    """A file or a record is not in LongBench's format."""


@dataclass(frozen=True)
class Record:
    """One LongBench record (THUDM/LongBench): question `input` about `context`, accepted `answers`.

    length: LongBench's own length figure (words or characters), kept as given. all_classes: the
    labels of a classification task, else None.
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
        for name in ("answers", "all_classes"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise RecordError(f"{name} = {value!r} must be a list of strings")
            object.__setattr__(self, name, None if value is None else tuple(value))
        if not self.answers:
            raise RecordError(f"record {self._id!r} has no answers; give at least one")

    def to_dict(self) -> dict[str, Any]:
        """LongBench's JSON object."""
        lists = {"answers": list(self.answers)}
        if self.all_classes is not None:
            lists["all_classes"] = list(self.all_classes)
        return asdict(self) | lists


FIELDS = tuple(Record.__dataclass_fields__)
REQUIRED = ("input", "context", "answers")


def record_from_dict(values: dict[str, Any]) -> Record:
    """A Record from LongBench's JSON object; RecordError names the missing fields."""
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise RecordError(f"record lacks {missing}; LongBench records hold {list(FIELDS)}")
    return Record(**{name: values[name] for name in FIELDS if name in values})


def load_records(path: str | Path, limit: int | None = None) -> list[Record]:
    """The records of a .jsonl file, in order, at most `limit` of them.

    Raises RecordError with the file and line for what is missing, not JSON or not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"no records at {path}; give the path of a LongBench-format .jsonl file")
    records = parsed_lines(path, limit, _parse)
    if not records and limit != 0:
        raise RecordError(f"{path} holds no records")
    return records


def parsed_lines(
    path: Path, limit: int | None, parse: Callable[[str, str], Record]
) -> list[Record]:
    """The first `limit` records of a file's lines, empty ones skipped; parse(line, "file:line")."""
    records: list[Record] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(records) >= limit:
                break
            if line.strip():
                records.append(parse(line, f"{path}:{number}"))
    return records


def save_records(records: Iterable[Record], path: str | Path) -> None:
    """Writes the records as .jsonl; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record.to_dict(), ensure_ascii=False) + "\n")
    os.replace(partial, path)


def group_by_context(records: Iterable[Record]) -> list[list[Record]]:
    """Records that share a context string, together; groups and members keep their first order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.context, []).append(record)
    return list(groups.values())


def _parse(line: str, where: str) -> Record:
    try:
        return record_from_dict(json.loads(line))
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: not a JSON object ({error.msg})") from error
    except (RecordError, TypeError, AttributeError) as error:
        raise RecordError(f"{where}: {error}") from error
