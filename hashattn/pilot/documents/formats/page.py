"""HTML as the text that a browser shows, with headings, lists and table rows as in Markdown.

What is not shown is left out: head, scripts, styles, comments, elements that are hidden. No link is
followed and nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from hashattn.pilot.documents.formats.reading import Reading
from hashattn.pilot.documents.formats.text import decoded

# head itself is not here: its end tag may be missing, and then the body stands in it
_UNSEEN = set(
    "script style title template noscript svg iframe object audio video canvas rp rt "
    "datalist".split()
)
_BLOCKS = set(
    "address article aside blockquote body caption center dd details div dl dt fieldset figcaption "
    "figure footer form h1 h2 h3 h4 h5 h6 header hr legend li main nav ol option p pre section "
    "summary table ul".split()
)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_LAYOUT = {"table", "ul", "ol", *_HEADINGS}  # in a cell, they say that the table only places things
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)


def read_page(content: bytes, kind: str, limits: dict) -> Reading:
    """An HTML file."""
    from bs4.dammit import EncodingDetector

    declared = EncodingDetector.find_declared_encoding(content, is_html=True)
    text, encoding, notes = decoded(content, declared)
    return Reading(page_lines(text), encoding, notes)


def page_lines(html: str) -> Iterator[str]:
    """Lines of the text that an HTML document shows."""
    from bs4 import BeautifulSoup
    from bs4.element import CData, NavigableString, Tag

    lines = _Lines()
    # an own stack: pages may be nested deeper than Python calls
    stack: list = [iter((BeautifulSoup(html, "html.parser"),))]
    entered: list[Tag] = []
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            if entered:
                lines.leave(entered.pop().name)
        elif isinstance(node, Tag):
            if not _unseen(node):
                lines.enter(node.name, node.attrs)
                entered.append(node)
                stack.append(iter(node.contents))
        elif type(node) in (NavigableString, CData):  # its subclasses are comments and the like
            lines.add(str(node))
    lines.end_line()
    yield from lines.done


def _unseen(node) -> bool:
    if node.name in _UNSEEN or "hidden" in node.attrs:
        return True
    return bool(_HIDDEN.search(str(node.attrs.get("style", ""))))


@dataclass
class _Table:
    """An open table: lines of each cell of its open row, None between rows; whether a cell holds
    blocks that make it a table of the page's layout."""

    cells: list[list[str]] | None = None
    layout: bool = False


@dataclass
class _List:
    """An open list: the number of its next item, None without numbers."""

    number: int | None


@dataclass
class _Lines:
    """Lines, as elements are entered and left."""

    done: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # of the open line
    prefix: str = ""  # of the next line
    tables: list[_Table] = field(default_factory=list)
    lists: list[_List] = field(default_factory=list)
    pre: int = 0  # how many <pre> are open

    def add(self, text: str) -> None:
        """Text; spaces and line ends count as one space outside <pre>."""
        if self.pre:
            first, *rest = text.split("\n")
            self.words.append(first)
            for line in rest:
                self.end_line()
                self.words.append(line)
        else:
            self.words.append(re.sub(r"[ \t\r\n\f]+", " ", text))

    def enter(self, name: str, attributes: dict) -> None:
        """The start of an element."""
        if name in _BLOCKS or name in ("br", "tr", "td", "th"):
            self.end_line()
        if self.tables and name in _LAYOUT:
            self.tables[-1].layout = True
        if name in _HEADINGS:
            self.emit("")
            self.prefix = _HEADINGS[name]
        elif name == "pre":
            self.pre += 1
        elif name in ("ul", "ol"):
            start = str(attributes.get("start", ""))
            first = int(start) if re.fullmatch(r"\d{1,9}", start) else 1
            self.lists.append(_List(first if name == "ol" else None))
        elif name == "li":
            self.prefix = self.item()
        elif name == "table":
            self.tables.append(_Table())
        elif name == "tr" and self.tables:
            self.end_row()
            self.tables[-1].cells = []
        elif name in ("td", "th") and self.tables:
            table = self.tables[-1]
            table.cells = [*(table.cells or []), []]

    def leave(self, name: str) -> None:
        """The end of an element."""
        if name in _BLOCKS or name in ("tr", "td", "th"):
            self.end_line()
        if name in _HEADINGS or name == "li":
            self.prefix = ""
        elif name == "pre":
            self.pre -= 1
        elif name in ("ul", "ol") and self.lists:
            self.lists.pop()
        elif name == "tr" and self.tables:
            self.end_row()
        elif name == "table" and self.tables:
            self.end_row()
            self.tables.pop()

    def item(self) -> str:
        """What begins the next item of the innermost list."""
        if not self.lists:
            return "- "
        innermost, indent = self.lists[-1], "  " * (len(self.lists) - 1)
        if innermost.number is None:
            return f"{indent}- "
        innermost.number += 1
        return f"{indent}{innermost.number - 1}. "

    def end_line(self) -> None:
        """Close the open line, if it holds anything."""
        text = "".join(self.words)
        text = text.rstrip() if self.pre else text.strip()
        self.words.clear()
        if text:
            self.emit(self.prefix + text)
            self.prefix = " " * len(self.prefix) if self.lists else ""

    def emit(self, line: str) -> None:
        """A line, into the open cell if there is one."""
        for table in reversed(self.tables):
            if table.cells:
                table.cells[-1].append(line)
                return
        if line or (self.done and self.done[-1]):  # never two empty lines
            self.done.append(line)

    def end_row(self) -> None:
        """Emit the row of the innermost table: one line, `a | b`; of layout, its lines."""
        table = self.tables[-1]
        cells, table.cells = table.cells or [], None
        layout, table.layout = table.layout, False
        if layout or sum(map(bool, cells)) <= 1:
            for line in (line for cell in cells for line in cell):
                self.emit(line)
        else:
            self.emit(" | ".join(" ".join(filter(None, cell)) for cell in cells))
