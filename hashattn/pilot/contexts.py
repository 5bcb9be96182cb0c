"""Documents packed into contexts: the texts that a pilot's model reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hashattn.trust.audit.source import Document

_HEAD = "# {name}\n"
_NAME = 60  # characters of a name that a heading shows: its end, where a path's own name is
_GAP = "\n\n"


@dataclass(frozen=True)
class Part:
    """A run of a document's text: characters [start, end), and its tokens."""

    name: str
    text: str
    start: int
    tokens: int

    @property
    def whole(self) -> str:
        """The part under its document's name, as contexts hold it."""
        return self.heading + self.text + _GAP

    @property
    def heading(self) -> str:
        """The line above it."""
        return _HEAD.format(name=self.name[-_NAME:])


@dataclass
class Context:
    """Parts of documents, one after the other, that fit a prompt together."""

    parts: list[Part] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All parts, each under the name of its document."""
        return "".join(part.whole for part in self.parts)

    @property
    def tokens(self) -> int:
        """Of all parts."""
        return sum(part.tokens for part in self.parts)

    def places(self, before: int = 0) -> list[Document]:
        """Where the parts stand in the text, which begins at character `before` of a prompt."""
        found = []
        for part in self.parts:
            start = before + len(part.heading)
            found.append(Document(part.name, start, start + len(part.text), part.start))
            before += len(part.whole)
        return found


def split_document(tokenizer: Any, name: str, text: str, room: int) -> list[Part]:
    """A document in parts of at most `room` tokens each, their heading included, of about the same
    size. A part ends with a line if one ends in its second half, else with a word, else anywhere.
    """
    tokens = _tokens(tokenizer, name, text)
    count = -(-tokens // room)
    size = min(room, -(-tokens // count) + room // 8)
    parts, start = [], 0
    while start < len(text):
        piece = text[start : start + 16 * room]  # no tokenizer reads more characters a token
        end = start + _fitting(tokenizer, name, piece, size)
        part = text[start:end]
        if part.strip():
            parts.append(Part(name, part, start, _tokens(tokenizer, name, part)))
        start = end
    return parts


def _fitting(tokenizer: Any, name: str, text: str, room: int) -> int:
    """How many of the text's first characters make a part."""
    reach, free = text, room - _tokens(tokenizer, name, "")
    while True:
        encoded = tokenizer(reach, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        if len(ends) <= free:
            return len(reach)
        cut = max(1, ends[max(0, free - 1)])
        for mark in ("\n", " ", "。"):
            at = reach.rfind(mark, cut // 2, cut)
            if at >= 0:
                cut = at + 1
                break
        if _tokens(tokenizer, name, reach[:cut]) <= room or cut == 1:
            return cut
        reach, free = reach[:cut], free - 1


def _tokens(tokenizer: Any, name: str, text: str) -> int:
    whole = Part(name, text, 0, 0).whole
    return len(tokenizer(whole, add_special_tokens=False)["input_ids"])


def pack(parts: Iterable[Part], room: int) -> list[Context]:
    """Parts in contexts of at most `room` tokens, in their order: what stands together in a folder
    is read together. A context of less than a quarter of that goes to another that has room."""
    contexts: list[Context] = []
    for part in parts:
        if not contexts or contexts[-1].tokens + part.tokens > room:
            contexts.append(Context())
        contexts[-1].parts.append(part)
    for small in [c for c in contexts if 4 * c.tokens < room]:
        others = [c for c in contexts if c is not small and c.tokens + small.tokens <= room]
        if others:
            max(others, key=lambda context: context.tokens).parts.extend(small.parts)
            contexts = [context for context in contexts if context is not small]
    return contexts


def best_parts(
    tokenizer: Any, questions: Sequence[str], parts: Sequence[Sequence[Part]]
) -> list[Part]:
    """For each question the part, of those it may be about, that BM25 ranks first (Robertson and
    Zaragoza 2009; bm25s), over the tokenizer's own tokens, so that no language is special."""
    every = {id(part): part for choice in parts for part in choice}
    chosen: list[Part] = []
    index = None
    for question, choice in zip(questions, parts, strict=True):
        if len(choice) == 1:
            chosen.append(choice[0])
            continue
        index = index or _Index(tokenizer, list(every.values()))
        scores = index.scores(question)
        chosen.append(max(choice, key=lambda part: scores[id(part)]))
    return chosen


class _Index:
    """BM25 scores of parts, by their identity."""

    def __init__(self, tokenizer: Any, parts: Sequence[Part]) -> None:
        from bm25s import BM25

        self._tokenizer, self._parts = tokenizer, parts
        self._ranking = BM25()
        self._ranking.index([self._words(part.text) for part in parts], show_progress=False)

    def scores(self, question: str) -> dict[int, float]:
        scores = self._ranking.get_scores(self._words(question))
        return {id(part): float(s) for part, s in zip(self._parts, scores, strict=True)}

    def _words(self, text: str) -> list[str]:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [str(token) for token in ids]
