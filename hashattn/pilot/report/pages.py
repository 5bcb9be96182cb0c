"""The whole report, from a result: page one, then the evidence, last how to run it again."""

from __future__ import annotations

from typing import Any

from hashattn.pilot.report.blocks import Page
from hashattn.pilot.report.closing import monitor_section, private_section, reproduce_section
from hashattn.pilot.report.costs import codes_section, preflight_section, speed_section
from hashattn.pilot.report.evidence import changed_section, documents_section
from hashattn.pilot.report.page_one import page_one
from hashattn.pilot.report.quality import floors_section, quality_section
from hashattn.pilot.report.wording import Words

_SECTIONS = (
    quality_section, floors_section, documents_section, changed_section, codes_section,
    speed_section, preflight_section, monitor_section, private_section, reproduce_section,
)  # fmt: skip


def page_of(result: dict[str, Any]) -> Page:
    """The page of a result that was checked and `judged`, in its language."""
    words = Words(result["language"])
    return Page(
        result["language"],
        page_one(result, words),
        words("page.contents"),
        tuple(section(result, words) for section in _SECTIONS),
    )
