"""The last sections: what to watch, privacy, and how to run it again."""

from __future__ import annotations

import json
from typing import Any

from hashattn.pilot.report import numbers
from hashattn.pilot.report.blocks import (
    Bullets,
    Cell,
    Code,
    Facts,
    Paragraph,
    Section,
    Table,
)
from hashattn.pilot.report.visible import NAME, TEXT, short
from hashattn.pilot.report.wording import Words

_OTHER = {"en": "ja", "ja": "en"}


def monitor_section(result: dict[str, Any], words: Words) -> Section:
    """What to watch in use and when to fit the codes again."""
    items = tuple(words.sentence(each) for each in result["monitor"])
    block = Bullets(items) if items else Paragraph(words("monitor.none"))
    return Section("monitor", words("monitor.title"), (block,))


def private_section(result: dict[str, Any], words: Words) -> Section:
    """What stayed on the machine, and by what."""
    private = result["private"]
    lines = [
        words("private.here"),
        words("private.sockets" if private["sockets_denied"] else "private.sockets_not"),
        words("private.offline" if private["offline"] else "private.offline_not"),
    ]
    return Section("private", words("private.title"), (Bullets(tuple(lines)),))


def reproduce_section(result: dict[str, Any], words: Words) -> Section:
    """The command, settings, versions and hashes."""
    made = result["made"]
    names = ("date", "version", "code", "model", "model_sha256", "seconds")
    facts = [
        (words(f"fact.{name}"), _fact(name, made[name], words))
        for name in names
        if made[name] is not None
    ]
    facts += [
        (words(f"fact.{name}") if words.has(f"fact.{name}") else short(name, NAME),
         _fact(name, value, words))
        for name, value in made["machine"].items()
    ]  # fmt: skip
    rows = tuple(
        (Cell(short(name, NAME)), Cell(_fact(name, value, words)))
        for name, value in made["settings"].items()
    )
    again = f"python -m hashattn.pilot.report pilot.json --language {_OTHER[words.language]}"
    blocks = [
        Paragraph(words("reproduce.intro")),
        Code(short(made["command"], 2000)),
        Paragraph(words("reproduce.again")),
        Code(again),
    ]
    if use := result.get("use"):
        blocks += [Paragraph(words("reproduce.use")), Code(short(use, 2000))]
    if rows:
        head = (words("reproduce.name"), words("reproduce.value"))
        blocks.append(Table(words("reproduce.settings"), head, rows))
    blocks += [Paragraph(words("reproduce.facts"), "head"), Facts(tuple(facts))]
    return Section("reproduce", words("reproduce.title"), tuple(blocks))


def _fact(name: str, value: Any, words: Words) -> str:
    """A setting as it was given: numbers in full, since a run is repeated from them."""
    if name == "seconds":
        return numbers.duration(value)
    if value is None:
        return words("value.none")
    return short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), TEXT)
