"""Documents of several kinds, scored by fidelity: how sparse attention reads what nobody labelled.

Nothing is downloaded: documentation is the corpus in data/, code and licences are what this Python
and its packages bring along, minutes are generated. Code and licences depend on what is installed;
a record's hash covers its text, so results of other texts are never taken for these.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from typing import Any

from hashattn.base.checks import require, require_one_of
from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.benchmarks.corpus import paragraphs, require_split, split_of
from hashattn.evaluation.benchmarks.minutes import meetings
from hashattn.evaluation.fidelity import document, fidelity_protocol
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record

_TOKENS, _NEW_TOKENS = 128, 32  # read at the end of a document, then generated
_LEAST = 2000  # characters of a licence that is worth reading


def _documentation(split: str, seed: int) -> Iterator[str]:
    return iter(paragraphs(split))


def _code(split: str, seed: int) -> Iterator[str]:
    """Modules of the standard library, by name: a file belongs to the split of its name."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if split_of(path.name) == split:
            yield path.read_text(encoding="utf-8", errors="replace")


def _legal(split: str, seed: int) -> Iterator[str]:
    """Licences of installed packages, each text once."""
    texts: dict[str, None] = {}
    for distribution in sorted(distributions(), key=lambda each: each.name or ""):
        for file in distribution.files or ():
            if any(word in file.name.upper() for word in ("LICEN", "COPYING", "NOTICE")):
                path = Path(str(distribution.locate_file(file)))
                if path.suffix in ("", ".txt", ".md", ".rst") and path.is_file():
                    texts[path.read_text(encoding="utf-8", errors="replace")] = None
    yield from (text for text in texts if len(text) >= _LEAST and split_of(text) == split)


def _minutes(language: str) -> Callable[[str, int], Iterator[str]]:
    return lambda split, seed: meetings(language, seed + (split == "eval") * 1_000_000)


KINDS: dict[str, Callable[[str, int], Iterator[str]]] = {
    "documentation": _documentation,
    "code": _code,
    "legal": _legal,
    "minutes": _minutes("en"),
    "minutes_ja": _minutes("ja"),
}


def documents(
    tokenizer: Any, kind: str, length: int, count: int, split: str = "eval", seed: int = 0
) -> list[str]:
    """`count` documents of a kind, each of at least `length` tokens and no text twice.

    Pieces of the kind (paragraphs, files, licences, meetings) follow one another until a document
    is long enough; a piece that is longer gives several. ValueError for an unknown kind or split,
    or a kind that has not so much text.
    """
    require_one_of("kind", kind, KINDS)
    pieces = _cut(KINDS[kind](require_split(split), seed), 4 * length)
    made: list[str] = []
    text = ""
    for piece in pieces:
        text = f"{text}\n{piece}" if text else piece
        if len(tokenizer(text)["input_ids"]) >= length:
            made.append(text)
            text = ""
        if len(made) == count:
            return made
    allowed = f"at most {len(made)} for documents of {length} tokens of {kind!r} ({split})"
    require(False, "count", count, allowed)
    return made


def _cut(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The texts, long ones in parts of so many characters, at line ends."""
    for text in texts:
        part = ""
        for line in text.splitlines(keepends=True):
            part += line
            if len(part) >= characters:
                yield part
                part = ""
        if part.strip():
            yield part


def records(
    profile: Any, tokenizer: Any, length: int, samples: int, folder: Path | None
) -> list[Record]:
    """`samples` held-out documents of each kind in profile.tasks."""
    kinds = (
        [document(text, kind, str(number)) for number, text in enumerate(
            documents(tokenizer, kind, length, samples, seed=profile.seed))]
        for kind in profile.tasks
    )  # fmt: skip
    return list(chain.from_iterable(kinds))


def protocol(profile: Any, length: int, folder: Path | None) -> Protocol:
    """Fidelity over the last tokens of each document's first and last `length` tokens."""
    return fidelity_protocol(
        _TOKENS, _NEW_TOKENS, sink=profile.sink, local=profile.local, seed=profile.seed,
        max_context=length - _NEW_TOKENS, truncation="middle",
    )  # fmt: skip


BENCHMARK = Benchmark(records, protocol, tasks=tuple(KINDS))
