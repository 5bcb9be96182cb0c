"""A report's three files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashattn.base.files import write_json, write_text
from hashattn.pilot.report.html import html_of
from hashattn.pilot.report.judged import judged
from hashattn.pilot.report.markdown import markdown_of
from hashattn.pilot.report.pages import page_of
from hashattn.pilot.report.result import check_result


@dataclass(frozen=True)
class ReportFiles:
    """Paths of what `save_report` wrote: one page, the same as Markdown, the numbers in full."""

    html: Path
    markdown: Path
    json: Path


def save_report(result: dict[str, Any], folder: str | os.PathLike) -> ReportFiles:
    """Write report.html, report.md and pilot.json into `folder`, each whole or not at all.

    result: a pilot's, in the form that `check_result` holds it to; its "language" is the report's.
    Where full attention was not told from guessing, all three say "cannot be judged", whatever the
    result says (`judged`). pilot.json comes first: a report that cannot be written does not lose
    the numbers. ReportError where the result is not of that form; WriteError.
    """
    check_result(result)
    result, folder = judged(result), Path(folder)
    json = write_json(folder / "pilot.json", result)
    page = page_of(result)
    markdown = write_text(folder / "report.md", markdown_of(page))
    return ReportFiles(write_text(folder / "report.html", html_of(page)), markdown, json)
