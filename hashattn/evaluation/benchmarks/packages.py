"""Questions about installed packages, answered by their own descriptions: real documents and
answers that need no judge.

A context is what several packages say of themselves (name, version, licence, summary, then their
description), in random order; a question repeats a package's lines up to the one that is asked for,
which models answer that follow no instructions. What is installed decides what is asked; a record's
hash covers its text, so results of other texts are never taken for these.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from hashattn.base.checks import require, require_numbers
from hashattn.base.hashes import sha256_text
from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record

_FIELDS = {"version": "Version", "licence": "License", "summary": "Summary"}  # in this order
_METRICS = {"version": "exact_match", "licence": "exact_match", "summary": "qa_f1"}
_DESCRIPTION = 1200  # characters of a description that are shown
_LONGEST = 80  # characters of a licence or summary that is asked for
_ROOM = 128  # tokens for the question and the answer


@dataclass(frozen=True)
class Package:
    """What a package says of itself; licence and summary are one line each."""

    name: str
    version: str
    licence: str
    summary: str
    description: str

    def text(self, characters: int = _DESCRIPTION) -> str:
        """Its document in a context, with the first `characters` of its description."""
        return f"{self.lines()}\n\n{self.description[:characters]}\n"

    def lines(self, before: str | None = None) -> str:
        """Its first lines, up to the value of the field `before`."""
        lines = f"Package: {self.name}"
        for field, title in _FIELDS.items():
            if field == before:
                return f"{lines}\n{title}:"
            lines += f"\n{title}: {getattr(self, field)}"
        return lines


@lru_cache(maxsize=1)
def packages() -> tuple[Package, ...]:
    """Installed packages that state everything that is asked, by name."""
    found = {package.name: package for package in map(_package, distributions()) if package}
    return tuple(found[name] for name in sorted(found))


def _package(distribution: Distribution) -> Package | None:
    about = distribution.metadata
    licence = about["License-Expression"] or about["License"] or ""
    description = (about.get_payload() or "").strip()[:_DESCRIPTION]
    lines = (about["Name"] or "", about["Version"] or "", licence, about["Summary"] or "")
    if not description or not all(0 < len(x) <= _LONGEST and "\n" not in x for x in lines):
        return None
    return Package(*lines, description)


def questions(tokenizer: Any, length: int, samples: int, tasks: tuple[str, ...],
              seed: int = 0) -> list[Record]:  # fmt: skip
    """`samples` records of each task; sample i asks every task about package i in one context of at
    most `length` tokens, the question and answer included. ValueError if a context
    would hold fewer than two packages, or fewer packages than samples are installed."""
    require_numbers({"samples": samples}, counts={"samples": 1})
    known = packages()
    require(samples <= len(known), "samples", samples, f"at most {len(known)}, the packages here")
    asked = random.Random(f"packages {seed}").sample(known, samples)
    made = []
    for number, package in enumerate(asked):
        rng = random.Random(f"packages {seed} {number}")
        context = _context(tokenizer, package, rng, length - _ROOM)
        made += [_record(task, package, context) for task in tasks]
    return made


def _context(tokenizer: Any, package: Package, rng: random.Random, limit: int) -> str:
    """The package's document among others', at most `limit` tokens, in random order."""
    taken = list(_fitting(tokenizer, [package, *rng.sample(packages(), len(packages()))], limit))
    allowed = "more tokens: a context needs the documents of two packages"
    require(len(taken) > 1, "length", limit + _ROOM, allowed)
    rng.shuffle(taken)
    return "\n".join(taken)


def _fitting(tokenizer: Any, order: list[Package], limit: int) -> Iterator[str]:
    """Documents in their order, each package once, those that still fit."""
    left = limit
    shown = min(_DESCRIPTION, limit)  # a third of a short context at most
    for text in dict.fromkeys(package.text(shown) for package in order):
        tokens = len(tokenizer(text + "\n", add_special_tokens=False)["input_ids"])
        if tokens <= left:
            left -= tokens
            yield text


def _record(task: str, package: Package, context: str) -> Record:
    question = package.lines(before=task)
    return Record(
        question, context, (getattr(package, task),), length=len(context), dataset=task,
        language="en", _id=sha256_text("\x00".join((context, question)))[:32],
    )  # fmt: skip


def records(
    profile: Any, tokenizer: Any, length: int, samples: int, folder: Path | None
) -> list[Record]:
    """questions() of the profile's tasks, seeded by it."""
    return questions(tokenizer, length, samples, profile.tasks, profile.seed)


def protocol(profile: Any, length: int, folder: Path | None) -> Protocol:
    """Context dense, question and one line of answer sparse."""
    return Protocol(
        sink=profile.sink, local=profile.local, seed=profile.seed, template="{context}\n{input}",
        datasets={task: {"metric": metric} for task, metric in _METRICS.items()},
    )  # fmt: skip


BENCHMARK = Benchmark(records, protocol, tasks=tuple(_FIELDS), drawn=True)
