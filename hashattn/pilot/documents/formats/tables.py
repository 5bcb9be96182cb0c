"""Tables (CSV, Excel) as rows of texts, and rows as lines that a language model can answer from.

A row becomes one line, `column: value; column: value`. A Markdown table would be shorter, but its
column names stand once, thousands of tokens above most rows: a model has to count cells to know
what a number means, and a cut context has lost the names. As lines each row says all by itself.
"""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hashattn.pilot.documents.formats.package import checked_package
from hashattn.pilot.documents.formats.reading import Reading, cleaned
from hashattn.pilot.documents.formats.text import decoded

_SAMPLE = 64 << 10  # characters by which the delimiter is told
_SEARCHED = 10  # rows among which the one with the columns' names is looked for
_NUMBER = re.compile(r"[\s\d.,:/%()+\-¥$€£年月日時分]*")  # a value, not the name of a column


def read_csv(content: bytes, kind: str, limits: dict) -> Reading:
    """A CSV or TSV file."""
    rows, encoding, notes = csv_rows(content)
    return Reading(table_lines(rows), encoding, notes)


def read_xlsx(content: bytes, kind: str, limits: dict) -> Reading:
    """An Excel workbook: its visible sheets, with the values that Excel last stored."""
    reading = Reading(())
    sheets = xlsx_sheets(content, kind, limits, reading.notes)
    reading.pieces = _sheet_lines(sheets)
    return reading


def _sheet_lines(sheets: Iterable[tuple[str, Iterable[list[str]]]]) -> Iterator[str]:
    for name, rows in sheets:
        lines = table_lines(rows)
        for first in lines:  # nothing of a sheet without cells
            yield f"\n# {name}\n{first}"
            yield from lines


def table_lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """One line a row, cells named by the columns' names; by letters, as in Excel, if it has none.

    The names: the first of ten rows with two filled cells or more, if none of them is a number or
    date and no two are equal. Rows above it, such as a title, stand by themselves.
    """
    rows = ([" ".join(cell.split()) for cell in row] for row in rows)
    filled = (row for row in rows if any(row))
    above: list[list[str]] = []
    names: list[str] = []
    for row in itertools.islice(filled, _SEARCHED):
        cells = [cell for cell in row if cell]
        if len(cells) > 1:
            if len(set(cells)) == len(cells) and not any(map(_NUMBER.fullmatch, cells)):
                names = row
            else:
                filled = itertools.chain([row], filled)
            break
        above.append(row)
    lone = not names  # a list in one column has no names either, and needs no letters
    for row in above:
        yield from filter(None, row)
    first = next(filled, None)
    if first is None:  # nothing under the names
        yield from [" | ".join(filter(None, names))] if names else []
        return
    for row in itertools.chain([first], filled):
        cells = [(column, cell) for column, cell in enumerate(row) if cell]
        if lone and len(cells) == 1 and cells[0][0] == 0:
            yield cells[0][1]
        else:
            yield "; ".join(f"{_name(names, column)}: {cell}" for column, cell in cells)


def csv_rows(content: bytes) -> tuple[Iterator[list[str]], str, list[tuple[str, dict]]]:
    """(rows, encoding, notes); the delimiter is what divides the first rows most evenly."""
    text, encoding, notes = decoded(content)
    text = cleaned(text)
    csv.field_size_limit(max(len(text), 1))
    named = re.match(r"sep=(.)\n", text)  # Excel's own first line
    if named:
        text = text[named.end() :]
    delimiter = named[1] if named else _delimiter(text[:_SAMPLE])
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), encoding, notes


def _delimiter(sample: str) -> str:
    """What divides the first row and most rows into as many cells; what divides nothing, if none.

    In doubt not the comma, which stands in prices and in sentences too.
    """
    scores = {}
    for delimiter in "\t;|,":
        rows = itertools.islice(csv.reader(io.StringIO(sample), delimiter=delimiter), 50)
        widths = [len(row) for row in rows if row] or [1]
        width = max(widths, key=widths.count)
        if width > 1:
            scores[delimiter] = (widths[0] == width, widths.count(width))
    return max(scores, key=scores.get, default="\x1f")


def xlsx_sheets(
    content: bytes, kind: str, limits: dict, notes: list[tuple[str, dict]]
) -> Iterator[tuple[str, Iterator[list[str]]]]:
    """(name, rows) of each visible sheet; notes: gets the number of formulas without a value."""
    from openpyxl import load_workbook

    file = checked_package(content, kind, limits)
    options = {"read_only": True, "keep_links": False}
    values = load_workbook(file, data_only=True, **options)
    formulas = load_workbook(file, **options) if _has_formulas(file) else None
    missing = [0]
    for sheet in values.worksheets:
        if sheet.sheet_state == "visible":
            rows = _rows(sheet)
            if formulas is not None:
                rows = _counted(rows, _rows(formulas[sheet.title]), missing)
            yield sheet.title, ([_shown(cell) for cell in row] for row in rows)
    if missing[0]:
        notes.append(("formulas", {"count": missing[0]}))


def _has_formulas(file: io.BytesIO) -> bool:
    with zipfile.ZipFile(file) as archive:
        sheets = [name for name in archive.namelist() if "/worksheets/" in name]
        return any(re.search(rb"<(\w+:)?f[ >/]", archive.read(name)) for name in sheets)


def _rows(sheet: Any) -> Iterator[tuple]:
    sheet.reset_dimensions()  # it may claim a million columns
    return sheet.iter_rows()


def _counted(rows: Iterator[tuple], formulas: Iterator[tuple], missing: list[int]) -> Iterator:
    """`rows`; missing[0]: gets the number of their formulas that have no value."""
    for row, formula_row in zip(rows, formulas, strict=False):
        pairs = zip(row, formula_row, strict=False)
        missing[0] += sum(c.value is None and f.data_type == "f" for c, f in pairs)
        yield row


def _shown(cell: Any) -> str:
    """A cell's value, nearly as Excel shows it."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, datetime.datetime):
        day_alone = value.time() == datetime.time()
        return value.date().isoformat() if day_alone else value.isoformat(" ", "minutes")
    if isinstance(value, int | float) and "%" in str(cell.number_format):
        return f"{value * 100:.12g}%"
    if isinstance(value, float):
        return f"{value:.15g}"
    return str(value)


def _name(names: Sequence[str], column: int) -> str:
    if column < len(names) and names[column]:
        return names[column]
    letters, rest = "", column + 1
    while rest:
        rest, digit = divmod(rest - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters
