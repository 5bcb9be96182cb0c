"""The sections that say what reading less costs: curves and tables by budget, and the floors on
which both rest."""

from __future__ import annotations

from typing import Any

from hashattn.base.checks import is_number
from hashattn.pilot.report import figures, numbers
from hashattn.pilot.report.blocks import (
    Block,
    Bullets,
    Cell,
    Figure,
    Figures,
    Key,
    Paragraph,
    Section,
    Table,
)
from hashattn.pilot.report.judged import CANNOT, FLOOR_OF
from hashattn.pilot.report.result import FINDINGS
from hashattn.pilot.report.wording import Words


def quality_section(result: dict[str, Any], words: Words) -> Section:
    """Curves, then a table for each measure that was taken."""
    rows = result["quality"]
    measured = [m for m in FLOOR_OF if any(row[m] is not None for row in rows)]
    told = [m for m in measured if any(is_told(row, m) for row in rows)]
    blocks: list[Block] = [Paragraph(words("quality.intro"))]
    if not measured:
        blocks += [Paragraph(words("quality.none"), "warn")]
    for measure in measured:
        if measure not in told:
            blocks.append(Paragraph(words("cannot.curve", measure=measure), "warn"))
    curves = [_curve(result, m, words) for m in told]
    if curves:
        blocks.append(Figures(tuple(curves)))
    blocks += [_table(result, measure, words) for measure in measured]
    used = {row[m]["verdict"] for row in rows for m in measured if row[m] is not None}
    if used:
        blocks.append(Bullets(_explained(used, result["made"]["settings"], words)))
    return Section("quality", words("quality.title"), tuple(blocks))


def _explained(used: set[str], settings: dict[str, Any], words: Words) -> tuple[str, ...]:
    """What the findings mean, and what was allowed where the settings say it."""
    lines = [words(f"explain.{name}") for name in FINDINGS if name in used]
    allowed = [settings.get(name) for name in ("tolerance", "kl_limit")]
    if used - {CANNOT} and all(map(is_number, allowed)):
        lines.append(words("explain.allowed", tolerance=allowed[0], kl=allowed[1]))
    return tuple(lines)


def floors_section(result: dict[str, Any], words: Words) -> Section:
    """Whether the model itself does better than guessing at what was asked of it."""
    rows = [
        _floor_row(name, floor, words)
        for name, floor in result["floors"].items()
        if words.has(f"floors.{name}")
    ]
    columns = ("what", "clear", "model", "guess", "difference", "count")
    table = Table(
        words("floors.caption"),
        tuple(words(f"floors.column.{name}") for name in columns),
        tuple(rows),
        frozenset(range(2, len(columns))),
        (Paragraph(cut_words(result["cut"], words), "quiet"),),
    )
    return Section("floors", words("floors.title"), (Paragraph(words("floors.intro")), table))


def _floor_row(name: str, floor: dict[str, Any] | None, words: Words) -> tuple[Cell, ...]:
    what, cannot = Cell(words(f"floors.{name}")), words(f"finding.{CANNOT}")
    if floor is None:
        blank = [Cell(numbers.NONE)] * 4
        return (what, Cell(cannot, words("floors.absent"), CANNOT), *blank)
    is_text = name == "text"  # in bits per byte, the others in points
    number = numbers.significant if is_text else numbers.score
    span = words("range.ratio" if is_text else "range.points", **floor)
    clear = Cell(words("floors.clear"), tone="kept")
    return (
        what,
        clear if floor["clear"] else Cell(cannot, words("floors.unclear"), CANNOT),
        Cell(number(floor["dense"])),
        Cell(number(floor["guess"])),
        Cell((numbers.significant if is_text else numbers.points)(floor["difference"]), span),
        Cell(numbers.count(floor["count"])),
    )


def cut_words(cut: dict[str, Any] | None, words: Words) -> str:
    """How many contexts were cut and answers lost, beside every table of quality."""
    if cut is None:
        return words("cut.unknown")
    if not cut["contexts"]:
        return words("cut.none", of=cut["of"])
    key = "cut.some" if cut["answers_lost"] is not None else "cut.some_untold"
    return words(key, contexts=cut["contexts"], of=cut["of"], lost=cut["answers_lost"])


def found(values: dict[str, Any], words: Words) -> str:
    """A difference in words: none was found where its interval holds 0."""
    if values["low"] <= 0 <= values["high"]:
        return words("found.none")
    return words("found.lower" if values["high"] < 0 else "found.higher")


def is_told(row: dict[str, Any], measure: str) -> bool:
    """Whether what a row measured may be shown beside full attention: `judged` has taken the
    verdict of those that may not."""
    values = row[measure]
    if values is None or values["verdict"] == CANNOT:
        return False
    return values.get("difference", 0) is not None


def _table(result: dict[str, Any], measure: str, words: Words) -> Table:
    make = _fidelity_row if measure == "fidelity" else _score_row
    rows = tuple(
        make(row, measure, is_told(row, measure), words)
        for row in result["quality"]
        if row[measure] is not None
    )
    if measure == "fidelity":
        columns, note = "kl agreement perplexity free read documents", "fidelity_note"
    else:
        columns, note = f"difference sparse full same read count.{measure}", "points_note"
    head = tuple(words(f"column.{name}") for name in ("budget", "finding", *columns.split()))
    notes = (cut_words(result["cut"], words), words(f"quality.{note}", measure=measure))
    return Table(
        words(f"quality.{measure}"),
        head,
        rows,
        frozenset(range(2, len(head))),
        tuple(Paragraph(text, "quiet") for text in notes),
    )


def _score_row(row: dict[str, Any], measure: str, told: bool, words: Words) -> tuple[Cell, ...]:
    values = row[measure]
    difference, same = Cell(words(f"finding.{CANNOT}"), tone=CANNOT), None
    if told:
        span = words("range.points", low=values["low"], high=values["high"])
        note = words("difference.note", range=span, found=found(values, words))
        difference, same = Cell(numbers.points(values["difference"]), note), values["same"]
    return (
        Cell(numbers.fraction(row["budget"])),
        _finding(values, measure, words),
        difference,
        Cell(_or_none(values["sparse"], numbers.score)),
        Cell(_or_none(values["dense"], numbers.score)),
        Cell(_or_none(same, numbers.percent)),
        Cell(numbers.percent(row["density"])),
        Cell(numbers.count(values["count"])),
    )


def _fidelity_row(row: dict[str, Any], measure: str, told: bool, words: Words) -> tuple[Cell, ...]:
    values = row[measure]
    compared = (Cell(words(f"finding.{CANNOT}"), tone=CANNOT), *[Cell(numbers.NONE)] * 3)
    if told:
        written, new = values["same_tokens"], values["new_tokens"]
        free = numbers.NONE
        if written is not None and new is not None:
            free = words("free.of", same=written, new=new)
        compared = (
            Cell(
                numbers.significant(values["kl"]),
                words("range.ratio", low=values["kl_low"], high=values["kl_high"]),
            ),
            Cell(numbers.percent(values["agreement"])),
            Cell(numbers.significant(values["perplexity_ratio"], 3)),
            Cell(free),
        )
    return (
        Cell(numbers.fraction(row["budget"])),
        _finding(values, "documents", words),
        *compared,
        Cell(numbers.percent(row["density"])),
        Cell(numbers.count(values["documents"])),
    )


def _or_none(value: float | None, spec: Any) -> str:
    return numbers.NONE if value is None else spec(value)


def _finding(values: dict[str, Any], unit: str, words: Words) -> Cell:
    """What was found, and below what is not clear yet how many samples would make it so."""
    verdict, more, note = values["verdict"], values["more"], ""
    if verdict == "open":
        note = words("more.untold" if more is None else f"more.{unit}", more=more)
    return Cell(words(f"finding.{verdict}"), note, verdict)


def _curve(result: dict[str, Any], measure: str, words: Words) -> Figure:
    rows = [row for row in result["quality"] if is_told(row, measure)]
    count = rows[0][measure]["documents" if measure == "fidelity" else "count"]
    if measure == "fidelity":
        points = [
            words("figure.point.kl", budget=row["budget"], kl=row["fidelity"]["kl"]) for row in rows
        ]
        return Figure(
            *figures.kl_curve(rows),
            title=words("figure.kl.title"),
            alt=words("figure.kl.alt", points=", ".join(points)),
            caption=words("figure.kl.caption", documents=count),
            keys=(Key("sparse", words("key.sparse")),),
        )
    floor = result["floors"][FLOOR_OF[measure]]
    points = [
        words("figure.point.score", budget=row["budget"], sparse=row[measure]["sparse"])
        for row in rows
    ]
    return Figure(
        *figures.score_curve(rows, measure, floor["guess"]),
        title=words("figure.score.title", measure=measure),
        alt=words(
            "figure.score.alt",
            dense=rows[0][measure]["dense"],
            guess=floor["guess"],
            points=", ".join(points),
        ),
        caption=words("figure.score.caption", measure=measure, count=count),
        keys=tuple(Key(name, words(f"key.{name}")) for name in ("sparse", "full", "guess")),
    )
