"""The report as Markdown (CommonMark with GitHub's tables). Every text is escaped, so that no
viewer finds markup, a link or a picture in what others wrote; pictures are described in words."""

from __future__ import annotations

import re
from functools import singledispatch

from hashattn.pilot.report.blocks import (
    Bullets,
    Cell,
    Code,
    Facts,
    Figures,
    Page,
    PageOne,
    Paragraph,
    Table,
)

_SYMBOLS = {  # of verdicts and findings, beside their words
    "go": "\u2713", "go_with_fallback": "\u25d0", "no_go": "\u2715", "cannot_be_judged": "?",
    "kept": "\u2713", "lost": "\u2715", "open": "\u2026",
}  # fmt: skip
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~#$]")
_START = re.compile(r"^(\d+)(?=[.)])|^(?=[-+=:])")
# what GitHub makes links of by itself: no character of the scheme's or host's start stays next to
# the one it needs
_LINKS = re.compile(r"(?<=[A-Za-z]):(?=//)|(?<=[Ww]{3})\.|@|(?<=mailto):|(?<=xmpp):", re.IGNORECASE)


def markdown_of(page: Page) -> str:
    """The whole report as text that ends in a line end."""
    parts = _first(page.first)
    for section in page.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text of one line in which Markdown finds nothing."""
    text = _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
    text = _LINKS.sub(lambda found: f"&#{ord(found[0])};", text)
    return _START.sub(lambda found: f"{found[0]}\\", text)


def _first(first: PageOne) -> list[str]:
    verdict = f"{_SYMBOLS[first.verdict]} {first.word}"
    parts = [
        f"# {escaped(first.title)}",
        escaped(first.eyebrow),
        f"## {escaped(verdict)}",
        escaped(first.means),
        f"**{escaped(first.budget_name)}:** {escaped(first.budget)}",
        *(f"**!** {escaped(text)}" for text in first.warnings),
        f"### {escaped(first.reasons_title)}",
        _bullets(first.reasons),
        f"### {escaped(first.tiles_title)}",
        _bullets(
            tuple(
                f"{tile.name}: {tile.value}{_symbol(tile.tone)}. {tile.text}"
                for tile in first.tiles
            )
        ),
        f"### {escaped(first.next_title)}",
        _bullets(first.next),
        escaped(first.made),
    ]
    return [part for part in parts if part]


def _symbol(tone: str) -> str:
    return f" {_SYMBOLS[tone]}" if tone in _SYMBOLS else ""


def _bullets(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {escaped(item)}" for item in items)


@singledispatch
def _block(block: object) -> str:
    raise TypeError(f"no Markdown for {type(block).__name__}")


@_block.register
def _(block: Paragraph) -> str:
    text = escaped(block.text)
    return f"**{text}**" if block.tone in ("head", "warn") else text


@_block.register
def _(block: Bullets) -> str:
    return _bullets(block.items)


@_block.register
def _(block: Facts) -> str:
    return _bullets(tuple(f"{name}: {value}" for name, value in block.pairs))


@_block.register
def _(block: Figures) -> str:
    return "\n\n".join(
        f"**{escaped(each.title)}.** {escaped(each.alt)} {escaped(each.caption)}"
        for each in block.items
    )


@_block.register
def _(block: Code) -> str:
    """A fence longer than any in the text."""
    runs = [len(run) for run in re.findall(r"`+", block.text)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    return f"{fence}\n{' '.join(block.text.split())}\n{fence}"


@_block.register
def _(block: Table) -> str:
    line = ["---:" if n in block.numeric else "---" for n in range(len(block.head))]
    rows = [[escaped(name) for name in block.head], line]
    rows += [[_cell(cell) for cell in row] for row in block.rows]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = [escaped(note.text) for note in block.notes]
    return "\n\n".join([f"**{escaped(block.caption)}**", text, *notes])


def _cell(cell: Cell) -> str:
    text = (
        escaped(cell.text) + _symbol(cell.tone) + (f" ({escaped(cell.note)})" if cell.note else "")
    )
    return f"[{text}]({cell.href})" if cell.href else text
