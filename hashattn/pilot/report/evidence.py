"""The sections that say what was read and which answers changed."""

from __future__ import annotations

from typing import Any

from hashattn.pilot.report import numbers
from hashattn.pilot.report.blocks import Block, Cell, Paragraph, Section, Table
from hashattn.pilot.report.quality import cut_words
from hashattn.pilot.report.visible import NAME, TEXT, short, visible
from hashattn.pilot.report.wording import Words

_ROWS = 200  # most of a table that a page shows
_USES = ("scored", "calibration", "unused")


def documents_section(result: dict[str, Any], words: Words) -> Section:
    """Documents read and what each was used for, and files that were skipped."""
    documents = result["documents"]
    counts = {name: len(documents[name]) for name in (*_USES, "skipped")}
    blocks: list[Block] = [Paragraph(words("documents.intro", **counts))]
    read = [(use, each) for use in _USES for each in documents[use]]
    if read:
        rows = tuple(
            (
                Cell(short(each["name"], NAME)),
                Cell(words(f"use.{use}")),
                Cell(short(each["kind"], NAME)),
                Cell(numbers.count(each["characters"])),
                Cell(numbers.count(each["tokens"])),
                Cell(words("documents.yes" if each["cut"] else "documents.no")),
            )
            for use, each in read[:_ROWS]
        )
        names = ("name", "use", "kind", "characters", "tokens", "cut")
        notes = (
            Paragraph(cut_words(result["cut"], words), "quiet"),
            *_rest(len(read), words),
            *_shortened([each["name"] for _, each in read[:_ROWS]], NAME, words),
        )
        head = tuple(words(f"documents.{name}") for name in names)
        blocks.append(Table(words("documents.read"), head, rows, frozenset({3, 4}), notes))
    else:
        blocks.append(Paragraph(words("documents.none"), "warn"))
    if documents["skipped"]:
        blocks.append(_skipped(documents["skipped"], words))
    return Section("documents", words("documents.title"), tuple(blocks))


def _skipped(skipped: list[dict[str, Any]], words: Words) -> Table:
    rows = tuple(
        (Cell(short(each["name"], NAME)), Cell(short(_reason(each, words))))
        for each in skipped[:_ROWS]
    )
    notes = (
        *_rest(len(skipped), words),
        *_shortened([each["name"] for each in skipped[:_ROWS]], NAME, words),
    )
    head = (words("documents.name"), words("documents.reason"))
    return Table(words("documents.skipped"), head, rows, notes=notes)


def _reason(each: dict[str, Any], words: Words) -> str:
    """The sentence of a key and its values where the file has them, else the reason as it is."""
    if "key" not in each:
        return each["reason"]
    return words.sentence(each, "documents")


def changed_section(result: dict[str, Any], words: Words) -> Section:
    """Questions whose answer differs, each with a link to its audit page."""
    changed = result["changed"]
    asked = any(row["questions"] is not None for row in result["quality"])
    if not changed:
        text = words("changed.none" if asked else "changed.none_asked")
        return Section("changed", words("changed.title"), (Paragraph(text),))
    rows = tuple(_changed_row(each, words) for each in changed[:_ROWS])
    names = ("question", "expected", "full", "sparse")
    head = (*(words(f"changed.{name}") for name in names), words("column.budget"))
    head += (words("changed.audit"),)
    texts = [each[name] for each in changed for name in ("question", "dense", "sparse")]
    texts += [words("changed.or").join(each["expected"] or ()) for each in changed]
    notes = (
        Paragraph(cut_words(result["cut"], words), "quiet"),
        *_rest(len(changed), words),
        *_shortened(texts, TEXT, words),
    )
    table = Table(words("changed.caption"), head, rows, notes=notes)
    return Section("changed", words("changed.title"), (Paragraph(words("changed.intro")), table))


def _changed_row(each: dict[str, Any], words: Words) -> tuple[Cell, ...]:
    question, document = short(each["question"]), each["document"]
    if document:
        question = words("changed.in", question=question, document=short(document, NAME))
    expected = short(words("changed.or").join(each["expected"] or ()))
    audit = each["audit"]
    return (
        Cell(question),
        Cell(expected or numbers.NONE),
        Cell(_answer(each["dense"], each["dense_right"], words)),
        Cell(_answer(each["sparse"], each["sparse_right"], words)),
        Cell(numbers.fraction(each["budget"])),
        Cell(words("changed.open"), href=audit) if audit else Cell(numbers.NONE),
    )


def _answer(text: str, right: bool | None, words: Words) -> str:
    shown = short(text) or words("changed.empty")
    if right is None:
        return shown
    return words("changed.right" if right else "changed.wrong", text=shown)


def _rest(rows: int, words: Words) -> tuple[Paragraph, ...]:
    if rows <= _ROWS:
        return ()
    return (Paragraph(words("documents.first", shown=_ROWS, all=rows), "quiet"),)


def _shortened(texts: list[str], limit: int, words: Words) -> tuple[Paragraph, ...]:
    if all(short(text, limit) == visible(text) for text in texts):
        return ()
    return (Paragraph(words("shortened"), "quiet"),)
