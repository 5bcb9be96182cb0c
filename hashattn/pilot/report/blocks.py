"""What a report is made of, whatever it is written as: sections of paragraphs, lists, tables,
pictures. Texts are plain; whoever writes HTML or Markdown escapes them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell of a table. note: what stands below the text, smaller. tone: a finding's name
    (`kept`, ...), which colours it and gives its symbol. href: a relative path."""

    text: str
    note: str = ""
    tone: str = ""
    href: str = ""


@dataclass(frozen=True)
class Paragraph:
    text: str
    tone: str = ""  # "", "warn", "quiet" or "head", which names what follows


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """head: names of columns, the first of which is each row's own. numeric: columns of numbers,
    by index. notes: paragraphs that belong to it, such as how many contexts were cut."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    notes: tuple[Paragraph, ...] = ()


@dataclass(frozen=True)
class Key:
    """One entry of a picture's legend. style: a line's or bar's name in `figures.STYLES`."""

    style: str
    text: str


@dataclass(frozen=True)
class Figure:
    """svg: a whole SVG document without words. width, height: its size in px."""

    svg: str
    width: float
    height: float
    title: str
    alt: str
    caption: str
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Figures:
    items: tuple[Figure, ...]


@dataclass(frozen=True)
class Facts:
    """Names and their values."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Code:
    """What one types, as it is."""

    text: str


Block = Paragraph | Bullets | Table | Figures | Facts | Code


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Tile:
    """One of page one's figures: a name, a large value, a sentence. tone as a Cell's."""

    name: str
    value: str
    text: str
    tone: str = ""


@dataclass(frozen=True)
class PageOne:
    """What a manager reads."""

    eyebrow: str
    title: str
    made: str
    verdict: str  # one of result.VERDICTS
    word: str
    means: str
    budget_name: str
    budget: str
    reasons_title: str
    reasons: tuple[str, ...]
    tiles_title: str
    tiles: tuple[Tile, ...]
    next_title: str
    next: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    language: str
    first: PageOne
    contents: str  # title of the list of sections
    sections: tuple[Section, ...] = field(default=())
