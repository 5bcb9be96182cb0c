"""The paper's numbers, and later ones on the same checkpoints, as data: data/reference/paper.csv.

Each row says where its number stands and how that was verified (data/reference/README.md).
"""

from __future__ import annotations

from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from hashattn.base.errors import HashAttnError
from hashattn.base.files import read_text
from hashattn.base.repository import repository

if TYPE_CHECKING:
    import pandas as pd

READ, QUOTED, COMPUTED = (
    "read in the source",
    "quoted by a third party",
    "computed from published numbers",
)
_VERIFIED = (READ, QUOTED, COMPUTED)
_RELATIONS = ("=", ">", ">=", "<", "<=")  # of the true value to the number in the row
SETUPS = ("", "A", "B")
DIFFERENCE = "difference"  # the metric of rows that subtract another method's score
REQUIRED = ("id", "table", "metric", "relation", "unit", "source", "verified")  # texts, never empty
_TEXTS = (
    *REQUIRED,
    "benchmark",
    "dataset",
    "model",
    "method",
    "minus",
    "protocol",
    "setup",
    "note",
)
_NUMBERS = (
    "bits_per_head", "auxiliary_bits", "density", "heavy", "length", "value", "samples", "datasets",
)  # fmt: skip
COLUMNS = frozenset((*_TEXTS, *_NUMBERS))


class PaperError(HashAttnError, ValueError):
    """The table of published numbers, or what is compared with it, is not valid."""


def paper_path() -> Path:
    """data/reference/paper.csv of the checkout."""
    return repository() / "data" / "reference" / "paper.csv"


def load_paper(path: str | Path | None = None) -> pd.DataFrame:
    """Every published number, a row each, indexed by id; columns as in data/reference/README.md.

    Unknown texts are "", unknown numbers NaN. path: a CSV file with the same columns, by default
    the repository's. Raises PaperError naming the first problem and its row: columns, an empty
    REQUIRED field, an id used twice, a value that is not allowed, a number that is not one.
    """
    import pandas as pd

    path = Path(path or paper_path())
    if not path.exists():
        raise PaperError(f"{path} does not exist: restore it with git checkout -- data/reference")
    text = read_text(path, PaperError)
    try:
        table = pd.read_csv(StringIO(text), dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' parser errors, as for a row with too many fields
        raise PaperError(f"{path} is not a table: {error}") from error
    names = sorted(COLUMNS ^ set(table.columns))
    if names:
        raise PaperError(f"{path}: columns {names} are missing or unknown; use {sorted(COLUMNS)}")
    for field in REQUIRED:
        _refuse(path, table, table[field].str.strip() == "", f"no {field}: every row needs one")
    _refuse(path, table, table["id"].duplicated(), "an id that another row has: make it its own")
    for field, allowed in (("verified", _VERIFIED), ("relation", _RELATIONS), ("setup", SETUPS)):
        _refuse(path, table, ~table[field].isin(allowed), f"{field} not one of {list(allowed)}")
    for field in _NUMBERS:
        numbers = pd.to_numeric(table[field], errors="coerce")
        wrong = numbers.isna() & ((table[field].str.strip() != "") | (field == "value"))
        _refuse(path, table, wrong, f"{field} that is not a number")
        table[field] = numbers
    unmatched = (table["metric"] == DIFFERENCE) != (table["minus"] != "")
    _refuse(path, table, unmatched, f"minus without metric {DIFFERENCE!r}, or the other way round")
    return table.set_index("id")


def _refuse(path: Path, table: pd.DataFrame, wrong: pd.Series, problem: str) -> None:
    """PaperError naming the first wrong row, if there is one."""
    if wrong.any():
        number = int(wrong.to_numpy().argmax())
        row = table.iloc[number]
        raise PaperError(f"{path}, row {number + 1} ({row['id'] or 'no id'}): {problem}")


@cache
def _loaded(path: Path) -> pd.DataFrame:
    return load_paper(path)


def cite(*ids: str, paper: pd.DataFrame | None = None) -> str:
    """A published number as text with its table: "-0.78, Table 2"; "> 1000, Table 8".

    Several ids of one table give their range: "2.54 to 4.3, abstract". paper: of load_paper, by
    default the repository's. PaperError for an unknown id, none, or rows of several tables.
    """
    rows = [_row(id, paper) for id in ids]
    tables = list(dict.fromkeys(row["table"] for row in rows))
    if len(tables) != 1:
        raise PaperError(f"cite() got {list(ids)} of tables {tables}: give ids of one table")
    rows.sort(key=lambda row: row["value"])
    if len(rows) == 1:
        return f"{_number(rows[0])}, {tables[0]}"
    return f"{rows[0]['value']:g} to {rows[-1]['value']:g}, {tables[0]}"


def _number(row: pd.Series) -> str:
    text = f"{row['value']:+g}" if row["metric"] == DIFFERENCE else f"{row['value']:g}"
    return text if row["relation"] == "=" else f"{row['relation']} {text}"


def _row(id: str, paper: pd.DataFrame | None) -> pd.Series:
    table = _loaded(paper_path()) if paper is None else paper
    if id not in table.index:
        from difflib import get_close_matches

        near = get_close_matches(id, table.index, n=3)
        raise PaperError(f"no published number is called {id!r}; did you mean one of {near}?")
    return table.loc[id]
