"""The sections that say what it costs: time and memory, codes, and the pre-flight's arithmetic."""

from __future__ import annotations

from typing import Any

from hashattn.pilot.report import figures, numbers
from hashattn.pilot.report.blocks import (
    Block,
    Bullets,
    Cell,
    Facts,
    Figure,
    Figures,
    Key,
    Paragraph,
    Section,
    Table,
)
from hashattn.pilot.report.page_one import speed
from hashattn.pilot.report.visible import NAME, short
from hashattn.pilot.report.wording import Words
from hashattn.pilot.settings import QUESTIONS


def speed_section(result: dict[str, Any], words: Words) -> Section:
    """Time as it was measured and where; memory that is held, and what of it a step reads."""
    latency, memory = result["latency"], result["memory"]
    pictures: list[Figure] = []
    blocks: list[Block] = []
    if latency is None:
        blocks.append(Paragraph(words("speed.none")))
    else:
        pictures.append(_latency_figure(latency, words))
        blocks.append(_latency_table(latency, words))
    if memory is not None:
        if result["quality"] and memory["kv_bytes"]:
            pictures.append(_memory_figure(result, words))
        blocks.append(_memory_table(memory, words))
    if pictures:
        blocks.insert(0, Figures(tuple(pictures)))
    return Section("speed", words("speed.title"), tuple(blocks))


def _latency_figure(latency: dict[str, Any], words: Words) -> Figure:
    points = [
        words("figure.point.latency", budget=each["budget"], ms=each["ms"]["median"])
        for each in latency["budgets"]
    ]
    return Figure(
        *figures.latency_bars(latency),
        title=words("figure.latency.title"),
        alt=words(
            "figure.latency.alt", dense=latency["dense_ms"]["median"], points=", ".join(points)
        ),
        caption=words("figure.latency.caption", **_where(latency)),
    )


def _latency_table(latency: dict[str, Any], words: Words) -> Table:
    dense = latency["dense_ms"]
    rows = [(Cell(words("speed.full")), _times(dense, words), *[Cell(numbers.NONE)] * 3)]
    rows += [
        (
            Cell(numbers.fraction(each["budget"])),
            _times(each["ms"], words),
            Cell(words("speed.times", speedup=each["speedup"])),
            Cell(speed(each, dense, words)),
            Cell(_below(each["dense_below"], words)),
        )
        for each in latency["budgets"]
    ]
    names = ("column.budget", "speed.ms", "speed.speedup", "column.found", "speed.below")
    return Table(
        words("speed.caption", **_where(latency)),
        tuple(words(name) for name in names),
        tuple(rows),
        frozenset({1, 2}),
        (Paragraph(words("speed.note"), "quiet"), Paragraph(_saved(latency, words), "quiet")),
    )


def _saved(latency: dict[str, Any], words: Words) -> str:
    """What a saved context would spare."""
    seconds = latency["prefill_seconds"]
    return words("speed.saved", context=latency["context"], questions=QUESTIONS, once=seconds,
                 each=QUESTIONS * seconds)  # fmt: skip


def _where(latency: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": short(latency["device"], NAME),
        "context": latency["context"],
        "steps": latency["steps"],
    }


def _below(tokens: int | None, words: Words) -> str:
    """Up to which length decoding stays dense."""
    if tokens is None:
        return words("speed.below.any")
    return words("speed.below.tokens", tokens=tokens)


def _times(ms: dict[str, float], words: Words) -> Cell:
    span = words("range.ratio", low=ms["low"], high=ms["high"])
    return Cell(numbers.significant(ms["median"]), span)


def _memory_figure(result: dict[str, Any], words: Words) -> Figure:
    memory, rows = result["memory"], result["quality"]
    kv, codes = memory["kv_bytes"], memory["code_bytes"]
    read = [row["density"] * kv for row in rows]
    points = [
        words("figure.point.memory", budget=row["budget"], bytes=each + codes)
        for row, each in zip(rows, read, strict=True)
    ]
    return Figure(
        *figures.memory_bars([row["budget"] for row in rows], [kv, *read], codes),
        title=words("figure.memory.title"),
        alt=words("figure.memory.alt", kv=kv, points=", ".join(points)),
        caption=words("figure.memory.caption", context=memory["context"], kv=kv),
        keys=tuple(Key(name, words(f"key.{name}")) for name in ("everything", "cache", "codes")),
    )


def _memory_table(memory: dict[str, Any], words: Words) -> Table:
    kv, codes = memory["kv_bytes"], memory["code_bytes"]
    rows = (
        (
            Cell(words("memory.kv")), Cell(numbers.size(memory["kv_bytes_per_token"])),
            Cell(numbers.size(kv)), Cell(numbers.NONE),
        ),
        (
            Cell(words("memory.codes")), Cell(numbers.size(memory["code_bytes_per_token"])),
            Cell(numbers.size(codes)), Cell(numbers.percent(codes / kv) if kv else numbers.NONE),
        ),
    )  # fmt: skip
    return Table(
        words("memory.caption", context=memory["context"]),
        tuple(words(f"memory.{name}") for name in ("what", "token", "all", "share")),
        rows,
        frozenset({1, 2, 3}),
        (Paragraph(words("memory.note"), "quiet"),),
    )


def codes_section(result: dict[str, Any], words: Words) -> Section:
    """What the codes are, what they were fitted to and how much attention they find."""
    codes, title = result["codes"], words("codes.title")
    if codes is None:
        return Section("codes", title, (Paragraph(words("codes.none")),))
    values = {
        "method": _named("codes.method", codes["method"], words),
        "bits": _or_none(codes["bits"], numbers.count),
        "origin": _named("codes.origin", codes["origin"], words),
        "tokens": _or_none(codes["tokens"], numbers.count),
        "bytes": numbers.size(codes["bytes_per_token"]),
        "mass": _or_none(codes["mass"], numbers.percent),
        "mass_of_exact": _or_none(codes["mass_of_exact"], numbers.percent),
        "mass_before": _or_none(codes["mass_before"], numbers.percent),
    }
    facts = Facts(tuple((words(f"codes.{name}"), value) for name, value in values.items()))
    return Section("codes", title, (Paragraph(words("codes.intro")), facts))


def _named(prefix: str, name: str, words: Words) -> str:
    key = f"{prefix}.{name}"
    return words(key) if words.has(key) else short(name, NAME)


def _or_none(value: Any, spec: Any) -> str:
    return numbers.NONE if value is None else spec(value)


def preflight_section(result: dict[str, Any], words: Words) -> Section:
    """What could be gained at most on the stated traffic, by arithmetic, and its price."""
    preflight, title = result["preflight"], words("preflight.title")
    if preflight is None:
        return Section("preflight", title, (Paragraph(words("preflight.none")),))
    verdict = words(f"preflight.{preflight['verdict']}")
    blocks: list[Block] = [Paragraph(verdict)]
    if preflight["reasons"]:
        blocks.append(
            Bullets(tuple(words.sentence(each, "capacity") for each in preflight["reasons"]))
        )
    if preflight["changes"]:
        changes = tuple(words.sentence(each, "capacity") for each in preflight["changes"])
        blocks += [Paragraph(words("preflight.changes"), "head"), Bullets(changes)]
    if preflight["memory"]:
        blocks.append(_holdings_table(preflight["memory"], words))
    cost = preflight["cost"]
    blocks.append(Paragraph(words("cost.none")) if cost is None else _cost_table(cost, words))
    if preflight["lines"]:
        rows = tuple(
            (Cell(words.sentence(each, "quantities")), Cell(_quantity(each, words)))
            for each in preflight["lines"]
        )
        head = (words("preflight.line"), words("preflight.value"))
        blocks.append(Table(words("preflight.caption"), head, rows, frozenset({1})))
    return Section("preflight", title, tuple(blocks))


def _holdings_table(memory: list[dict[str, Any]], words: Words) -> Table:
    """What a device would hold of the cache."""
    rows = tuple(
        (
            Cell(words.sentence(each["note"], "capacity")),
            Cell(numbers.size(each["bytes"])),
            Cell(numbers.count(each["longest_context"])),
        )
        for each in memory
    )
    head = tuple(words(f"holdings.{name}") for name in ("what", "bytes", "longest"))
    return Table(words("holdings.caption"), head, rows, frozenset({1, 2}))


def _quantity(each: dict[str, Any], words: Words) -> str:
    """A number of the pre-flight with its unit."""
    value, unit = each["value"], each["unit"]
    if value is None:
        return numbers.NONE
    key = f"quantity.{unit}"
    return words(key, value=value) if words.has(key) else f"{numbers.significant(value)} {unit}"


def _cost_table(cost: dict[str, Any], words: Words) -> Table:
    hours = [cost["gpu_hours_dense"], cost["gpu_hours_sparse"]]
    rows = [(Cell(words("cost.hours")), *(Cell(numbers.significant(each)) for each in hours))]
    currency = short(cost["currency"] or "", NAME)
    money = [cost["money_dense"], cost["money_sparse"]]
    if None not in money:
        what = words("cost.money", currency=currency)
        rows.append((Cell(what), *(Cell(numbers.significant(each)) for each in money)))
    given = {name: cost[name] for name in ("tokens_per_day", "days", "price_per_hour")}
    untold = "_untold" if None in given.values() else ""
    note = words(
        f"cost.given{untold}",
        tokens=given["tokens_per_day"],
        days=given["days"],
        price=given["price_per_hour"],
        currency=currency,
    )
    return Table(
        words("cost.caption"),
        tuple(words(f"cost.{name}") for name in ("what", "full", "sparse")),
        tuple(rows),
        frozenset({1, 2}),
        (Paragraph(note, "quiet"),),
    )
