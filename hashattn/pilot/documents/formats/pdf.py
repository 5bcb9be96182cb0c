"""PDF by PDFium: the text of its pages in their order, with wrapped lines joined again."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from hashattn.pilot.documents.formats.reading import Reading
from hashattn.pilot.documents.skipped import Refused

_HYPHEN = "\ufffe"  # PDFium's, for a hyphen and the line end after it
_WIDE = "[\u3041-\u30ff\u3400-\u9fff\uff10-\uff5a々〆ー、]"  # kana, kanji, wide letters, and 、
_LATIN = re.compile(r"[^\W\d_][,;]?$"), re.compile(r"[a-zà-öø-ÿ]{2}")
_NARROWEST = 32  # half-width characters of a line of text; rows of tables may be shorter
_NUMBERED = re.compile(r"[0-9A-Za-z]{1,3}[.)．）、]")  # begins an item of a list
_NARROW = "[0-9A-Za-z]"
_JAPANESE = (
    (re.compile(f"{_WIDE}$"), re.compile(f"{_WIDE}|{_NARROW}")),
    (re.compile(f"{_NARROW}$"), re.compile(_WIDE)),
)


def read_pdf(content: bytes, kind: str, limits: dict) -> Reading:
    """A PDF file; Refused if it needs a password or is damaged. Pages of pictures are noted."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(content)
        pages = len(document)
    except pypdfium2.PdfiumError as problem:
        if problem.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            raise Refused("encrypted") from problem
        raise Refused("damaged", kind="PDF") from problem
    if not pages:
        raise Refused("damaged", kind="PDF")
    reading = Reading((), empty="no_text_layer")
    reading.pieces = _pages(document, pages, reading.notes)
    return reading


def _pages(document: Any, pages: int, notes: list) -> Iterator[str]:
    """The text of each page that has any; notes: gets the number of those that are pictures."""
    import pypdfium2

    pictures = 0
    for number in range(pages):
        try:
            page = document[number]
            text = page.get_textpage().get_text_range()
        except pypdfium2.PdfiumError:  # a page of a damaged file; what the others hold is good
            pictures += 1
            continue
        if text.strip():
            yield mended(text)
        else:
            kinds = [pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]
            pictures += any(True for _ in page.get_objects(filter=kinds))
        page.close()
    if 0 < pictures < pages:
        notes.append(("picture_pages", {"count": pictures, "of": pages}))


def mended(text: str) -> str:
    """Lines of a page joined where a sentence plainly goes on, left as they are elsewhere.

    A Latin line goes on where a letter or comma ends it and a word in small letters follows; a
    Japanese one, whose letters tell nothing, where no mark ends it and it is about as wide as the
    page's wide lines. A hyphen at a line's end stays, with the line end: whether it belongs to the
    word is not guessed.
    """
    text = text.replace(_HYPHEN, "-\n").replace("\r\n", "\n")
    lines = [line.strip() for line in text.split("\n")]
    widths = sorted(map(_width, lines))
    full = max(_NARROWEST, 0.8 * widths[len(widths) * 3 // 4])
    joined = lines[:1]
    for above, line in zip(lines, lines[1:], strict=False):
        if _matches(_LATIN, above, line):
            joined[-1] += " " + line
        elif (
            _width(above) >= full
            and not _NUMBERED.match(line)
            and any(_matches(side, above, line) for side in _JAPANESE)
        ):
            joined[-1] += line
        else:
            joined.append(line)
    return "\n".join(joined)


def _width(line: str) -> int:
    """In half-width characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def _matches(ends: tuple[re.Pattern, re.Pattern], above: str, line: str) -> bool:
    return bool(ends[0].search(above) and ends[1].match(line))
