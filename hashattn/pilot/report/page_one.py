"""Page one: what to do, why, three figures, what next. It stands alone on paper."""

from __future__ import annotations

from typing import Any

from hashattn.pilot.report import numbers
from hashattn.pilot.report.blocks import PageOne, Tile
from hashattn.pilot.report.judged import FLOOR_OF
from hashattn.pilot.report.quality import cut_words, found, is_told
from hashattn.pilot.report.visible import NAME, short
from hashattn.pilot.report.wording import Words

_REASONS, _NEXT = 6, 4  # most that page one shows


def page_one(result: dict[str, Any], words: Words) -> PageOne:
    """Of a result that was `judged`."""
    recommendation, made, documents = (
        result[name] for name in ("recommendation", "made", "documents")
    )
    verdict, budget = recommendation["verdict"], recommendation["budget"]
    note = f"note.{made['model_note']}"
    read = sum(len(documents[use]) for use in ("scored", "calibration", "unused"))
    cut, shown = result["cut"], recommendation["reasons"][:_REASONS]
    said = any(reason["key"] == "contexts_cut" for reason in shown)
    return PageOne(
        eyebrow=words("page.eyebrow"),
        title=short(result["title"], NAME),
        made=words(
            "page.made",
            date=short(made["date"], NAME),
            model=short(made["model"], NAME),
            note=words(note) if words.has(note) else short(made["model_note"], NAME),
            documents=read,
            skipped=len(documents["skipped"]),
        ),
        verdict=verdict,
        word=words(f"verdict.{verdict}"),
        means=words(f"means.{verdict}"),
        budget_name=words("budget.name"),
        budget=words("budget.none") if budget is None else words("budget.read", budget=budget),
        reasons_title=words("reasons.title"),
        reasons=tuple(words.sentence(each) for each in shown),
        tiles_title=words("tiles.title"),
        tiles=(
            _quality_tile(result, words),
            _memory_tile(result, words),
            _cost_tile(result, words),
        ),
        next_title=words("next.title"),
        next=_next(result, words),
        warnings=() if said or not (cut and cut["contexts"]) else (cut_words(cut, words),),
    )


def _shown_row(result: dict[str, Any]) -> dict[str, Any] | None:
    """The row of `quality` that page one speaks of: the recommended budget's, else the densest, at
    which sparse attention does best."""
    budget = result["recommendation"]["budget"]
    rows = result["quality"]
    return next((row for row in rows if row["budget"] == budget), rows[0] if rows else None)


def _quality_tile(result: dict[str, Any], words: Words) -> Tile:
    name, row = words("tile.quality"), _shown_row(result)
    if row is None:
        return Tile(name, words("unknown"), words("tile.quality.none"))
    for measure in FLOOR_OF:
        values = row[measure]
        if not is_told(row, measure):
            continue
        values = values | {"budget": row["budget"], "measure": measure}
        if measure == "fidelity":
            values |= {"low": values["kl_low"], "high": values["kl_high"]}
            return Tile(
                words("heading.fidelity"),
                words("tile.fidelity.value", **values),
                words("tile.fidelity.text", **values),
                values["verdict"],
            )
        return Tile(
            name,
            words("tile.quality.value", **values),
            words("tile.quality.text", found=found(values, words), **values),
            values["verdict"],
        )
    cannot = words("finding.cannot_be_judged")
    return Tile(
        name, cannot[:1].upper() + cannot[1:], words("tile.quality.cannot"), "cannot_be_judged"
    )


def _memory_tile(result: dict[str, Any], words: Words) -> Tile:
    name, memory = words("tile.memory"), result["memory"]
    if memory is None or not memory["kv_bytes"]:
        return Tile(name, words("unknown"), "")
    share = memory["code_bytes"] / memory["kv_bytes"]
    text = words("tile.memory.text", kv=memory["kv_bytes"], context=memory["context"])
    return Tile(name, f"+{numbers.percent(share)}", text)


def _cost_tile(result: dict[str, Any], words: Words) -> Tile:
    """GPU hours where a price and traffic were given, else the time measured here."""
    cost = (result["preflight"] or {}).get("cost")
    if cost is not None:
        value = words(
            "tile.cost.value", dense=cost["gpu_hours_dense"], sparse=cost["gpu_hours_sparse"]
        )
        return Tile(words("tile.cost"), value, _cost_text(cost, words))
    latency, name = result["latency"], words("tile.speed")
    row = _shown_row(result)
    rows = latency["budgets"] if latency is not None else []
    timed = next((each for each in rows if row and each["budget"] == row["budget"]), None)
    timed = timed or (rows[0] if rows else None)
    if timed is None:
        return Tile(name, words("tile.speed.none"), words("tile.speed.none.text"))
    text = words(
        "tile.speed.text",
        budget=timed["budget"],
        ms=timed["ms"]["median"],
        dense=latency["dense_ms"]["median"],
        context=latency["context"],
        steps=latency["steps"],
    )
    return Tile(name, speed(timed, latency["dense_ms"], words), text)


def speed(timed: dict[str, Any], dense: dict[str, float], words: Words) -> str:
    """How a budget's time compares; no difference where the spans of the two times meet."""
    ms, speedup = timed["ms"], timed["speedup"]
    if ms["low"] <= dense["high"] and dense["low"] <= ms["high"]:
        return words("tile.speed.same")
    if speedup >= 1:
        return words("tile.speed.faster", speedup=speedup)
    return words("tile.speed.slower", slowdown=1 / speedup if speedup > 0 else None)


def _cost_text(cost: dict[str, Any], words: Words) -> str:
    known = cost["days"] is not None and cost["tokens_per_day"] is not None
    period = words(
        "tile.cost.period" if known else "tile.cost.period_untold",
        days=cost["days"],
        tokens=cost["tokens_per_day"],
    )
    money = ""
    if cost["money_dense"] is not None and cost["money_sparse"] is not None:
        money = words(
            "tile.cost.money" if cost["price_per_hour"] is not None else "tile.cost.money_untold",
            dense=cost["money_dense"],
            sparse=cost["money_sparse"],
            currency=short(cost["currency"] or "", NAME),
            price=cost["price_per_hour"],
        )
    return words("tile.cost.text", period=period, money=money)


def _next(result: dict[str, Any], words: Words) -> tuple[str, ...]:
    """What the verdict asks for and what each reason does, the most important first."""
    recommendation, verdict = result["recommendation"], result["recommendation"]["verdict"]
    steps = [words(f"next.verdict.{verdict}")] if words.has(f"next.verdict.{verdict}") else []
    for reason in recommendation["reasons"]:
        key, values = f"next.{reason['key']}", reason["values"]
        if words.has(own := f"{key}.{values.get('measure')}"):
            key = own
        if None in values.values() and words.has(f"{key}_untold"):
            key = f"{key}_untold"
        if words.has(key) and (text := words(key, **values)) not in steps:
            steps.append(text)
    return tuple(steps[:_NEXT])
