"""Word documents and PowerPoint slides as text, with headings and table rows as in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hashattn.pilot.documents.formats.package import checked_package
from hashattn.pilot.documents.formats.page import page_lines
from hashattn.pilot.documents.formats.reading import Reading

_STYLES = "p[style-name='Title'] => h1:fresh\np[style-name='Subtitle'] => h2:fresh"


def read_docx(content: bytes, kind: str, limits: dict) -> Reading:
    """A Word document, through mammoth and HTML: unlike python-docx it reads content controls,
    tracked insertions, text boxes and footnotes, of which contracts consist. Pictures are not
    opened, links not followed; headers, footers and comments are left out."""
    import mammoth

    html = mammoth.convert_to_html(
        checked_package(content, kind, limits),
        style_map=_STYLES,
        include_embedded_style_map=False,
        external_file_access=False,
        convert_image=mammoth.images.img_element(lambda image: {}),
    ).value
    return Reading(page_lines(html))


def read_pptx(content: bytes, kind: str, limits: dict) -> Reading:
    """A presentation: its slides' titles, texts, tables and notes, in the order of the slides."""
    import pptx

    slides = pptx.Presentation(checked_package(content, kind, limits)).slides
    return Reading(line for slide in slides for line in _slide(slide))


def _slide(slide: Any) -> Iterator[str]:
    title = slide.shapes.title
    if title is not None and title.text_frame.text.strip():
        yield f"\n# {' '.join(title.text_frame.text.split())}"
    else:
        yield ""
    named = None if title is None else title.shape_id
    yield from _shapes(shape for shape in slide.shapes if shape.shape_id != named)
    notes = slide.has_notes_slide and slide.notes_slide.notes_text_frame
    if notes and notes.text.strip():
        yield notes.text


def _shapes(shapes: Any) -> Iterator[str]:
    for shape in shapes:
        if hasattr(shape, "shapes"):  # a group
            yield from _shapes(shape.shapes)
        elif getattr(shape, "has_table", False):
            for row in shape.table.rows:
                yield " | ".join(" ".join(cell.text.split()) for cell in row.cells)
        elif getattr(shape, "has_text_frame", False):
            for paragraph in shape.text_frame.paragraphs:
                if paragraph.text.strip():
                    yield f"{'  ' * paragraph.level}{paragraph.text}"
