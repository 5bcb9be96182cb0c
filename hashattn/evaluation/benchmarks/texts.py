"""Documents of several kinds, scored by fidelity: how sparse attention reads what nobody labelled.

Nothing is downloaded: documentation is the corpus in data/ and descriptions of packages, code and
licences are what this Python and its packages bring along, stories and minutes are generated. All
but the corpus and what is generated depend on what is installed; a record's hash covers its text,
so results of other texts are never taken for these.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import Distribution, distributions
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hashattn.base.checks import require, require_one_of
from hashattn.base.hashes import sha256_text
from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.benchmarks.corpus import paragraphs, split_of
from hashattn.evaluation.benchmarks.minutes import meetings
from hashattn.evaluation.benchmarks.prose import stories
from hashattn.evaluation.fidelity import document, fidelity_protocol
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record

TRAIN, VALIDATION, EVAL = _SPLITS = ("train", "validation", "eval")
_VALIDATION_BELOW = "20"  # in hexadecimal: an eighth of what does not belong to evaluation
_SHELF = 32  # documents of a kind at most: what is generated never ends
_TOKENS, _NEW_TOKENS = 64, 32  # read at the end of a document, then generated
_LEAST = 2000  # characters of a licence or a description that is worth reading


def _owns(split: str, text: str, even: bool = False) -> bool:
    """Whether a piece of text belongs to a split: decided by its SHA-256 alone. even: evaluation
    gets three fifths of what there is, not one."""
    if split_of(text) == EVAL or (even and sha256_text(text)[:1] < "8"):
        return split == EVAL
    validates = sha256_text(text)[2:4] < _VALIDATION_BELOW
    return split == (VALIDATION if validates else TRAIN)


def _documentation(split: str, seed: int) -> Iterator[str]:
    """The corpus in data/ and, for evaluation, what installed packages say of themselves."""
    yield from (text for part in (TRAIN, EVAL) for text in paragraphs(part) if _owns(split, text))
    if split == EVAL:
        for distribution in _distributions():
            description = distribution.metadata.get_payload()
            if len(description) >= _LEAST:
                yield description


def _code(split: str, seed: int) -> Iterator[str]:
    """Modules of the standard library, by name: a file belongs to the split of its name."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if _owns(split, path.name):
            yield path.read_text(encoding="utf-8", errors="replace")


def _legal(split: str, seed: int) -> Iterator[str]:
    """Licences of installed packages, each text once."""
    texts: dict[str, None] = {}
    for distribution in _distributions():
        for file in distribution.files or ():
            if any(word in file.name.upper() for word in ("LICEN", "COPYING", "NOTICE")):
                path = Path(str(distribution.locate_file(file)))
                if path.suffix in ("", ".txt", ".md", ".rst") and path.is_file():
                    texts[path.read_text(encoding="utf-8", errors="replace")] = None
    yield from (text for text in texts if len(text) >= _LEAST and _owns(split, text, even=True))


def _distributions() -> list[Distribution]:
    return sorted(distributions(), key=lambda each: each.name or "")


def _generated(make: Callable[[int], Iterator[str]]) -> Callable[[str, int], Iterator[str]]:
    """A kind that is generated; splits are seeds."""
    return lambda split, seed: make(seed + 1_000_000 * _SPLITS.index(split))


KINDS: dict[str, Callable[[str, int], Iterator[str]]] = {
    "documentation": _documentation,
    "prose": _generated(stories),
    "code": _code,
    "legal": _legal,
    "minutes": _generated(partial(meetings, "en")),
    "minutes_ja": _generated(partial(meetings, "ja")),
}


def documents(
    tokenizer: Any, kind: str, length: int, count: int, split: str = EVAL, seed: int = 0
) -> list[str]:
    """`count` documents of a kind, each of at least `length` tokens and no text twice.

    Pieces of the kind (paragraphs, files, licences, meetings) follow one another until a document
    is long enough; a piece that is longer gives several. ValueError for an unknown kind or split,
    or a kind that has not so much text.
    """
    made = list(islice(_documents(tokenizer, kind, length, split, seed), count))
    allowed = f"at most {len(made)} for documents of {length} tokens of {kind!r} ({split})"
    require(len(made) == count, "count", count, allowed)
    return made


def _documents(tokenizer: Any, kind: str, length: int, split: str, seed: int) -> Iterator[str]:
    """All documents of a kind, one after the other."""
    require_one_of("kind", kind, KINDS)
    require_one_of("split", split, _SPLITS)

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    text, long = "", 0  # long: tokens of its pieces, a few more than its own
    for piece in _cut(KINDS[kind](split, seed), 4 * length):
        text, long = (f"{text}\n{piece}" if text else piece), long + tokens(f"\n{piece}")
        if long >= length and tokens(text) >= length:
            yield text
            text, long = "", 0


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


def sequences(
    tokenizer: Any, kinds: Sequence[str], length: int, count: int, *, split: str, first: int = 0
) -> list[tuple[list[int], list[int]]]:
    """(token ids (length,), positions of queries) of documents `first` to `first + count` of a
    split, which take the kinds in turn.

    Queries are those of every 32nd position or, in the evaluation split, of every 2nd of the last
    64, so that all of them see nearly `length` tokens. Where a kind has fewer documents it begins
    again. ValueError for a kind without a document of that length.
    """
    taken = []
    for number in range(first, first + count):
        kind = kinds[number % len(kinds)]
        library = _library(tokenizer, kind, length, split)
        ids = library[number // len(kinds) % len(library)]
        rows = range(length - _TOKENS, length, 2) if split == EVAL else range(31, length, 32)
        taken.append((ids, [row for row in rows if row >= 0]))
    return taken


@lru_cache(maxsize=32)
def _library(tokenizer: Any, kind: str, length: int, split: str) -> list[list[int]]:
    """Token ids of a kind's documents, the first `length` of each."""
    made = islice(_documents(tokenizer, kind, length, split, 0), _SHELF)
    library = [tokenizer(text, verbose=False)["input_ids"][:length] for text in made]
    require(bool(library), "length", length, f"shorter for texts of {kind!r} ({split})")
    return library


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
