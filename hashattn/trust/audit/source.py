"""The text a prompt was made of: its tokens, its passages, and the files these came from.

All positions are characters (Unicode code points, as Python counts them), half-open [start, end).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hashattn.base.checks import is_count, require
from hashattn.base.errors import HashAttnError

PROMPT = "prompt"  # the source of text that is in no document
_SENTENCE = 48  # tokens after which a passage may end with a sentence
_LONGEST = 96  # tokens after which it ends with a word; after twice as many, anywhere
_SENTENCE_ENDS = (".", "!", "?")
_WIDE_ENDS = ("。", "！", "？")  # no space follows them
_SURROGATE = re.compile("[\ud800-\udfff]")


class AuditError(HashAttnError, ValueError):
    """An audit cannot be kept, read or shown."""


@dataclass(frozen=True)
class Document:
    """A part of the prompt that came from a file.

    The prompt's characters [start, end) are the file's from character `offset` on.
    """

    name: str
    start: int
    end: int
    offset: int = 0


@dataclass(frozen=True)
class Place:
    """Characters [start, end) of `source`, a document's name or "prompt", which are characters
    [prompt_start, prompt_end) of the prompt."""

    source: str
    start: int
    end: int
    prompt_start: int
    prompt_end: int


@dataclass(frozen=True)
class Source:
    """A prompt's text, and where each of its tokens stands in it.

    ids: token ids. offsets: [start, end) of each token in `text`; empty for a token that stands for
    no text. documents: parts that came from files, in order, not overlapping. passages: runs of
    tokens [first, last) in order, at most one document in each, together all tokens with text.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    documents: tuple[Document, ...]
    passages: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        text: str,
        ids: Sequence[int] | Any = None,
        documents: Sequence[Document] = (),
        most: int = 128,
    ) -> Source:
        """The source of a prompt that a fast tokenizer reads.

        ids: what the model is given, (n,) or (1, n), if not `tokenizer(text)`: they are compared
        with `text` tokenised with and without special tokens. most: how many passages the text is
        cut into at most, beside one more for each edge of a document. A passage ends with a line,
        a long one with a sentence. Half surrogate pairs, which no tokenizer takes, are read as
        U+FFFD. AuditError where offsets cannot be known; ValueError for documents out of order.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise AuditError(
                "an audit needs the characters of each token, which only fast tokenizers know: "
                "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        _check_documents(documents, len(text))
        encoded = _encode(tokenizer, text, None if ids is None else _flat(ids))
        offsets = tuple((int(a), int(b)) for a, b in encoded["offset_mapping"])
        ids = tuple(map(int, encoded["input_ids"]))
        require(len(ids) > 0, "text", text, "a prompt of at least one token")
        documents = tuple(documents)
        return cls(text, ids, offsets, documents, _passages(text, offsets, documents, most))

    @cached_property
    def owners(self) -> list[int]:
        """For each token the number of its document, -1 for none."""
        return _owners(self.offsets, self.documents)

    def segments(self, n: int) -> np.ndarray:
        """For each of n cached tokens, (n,) int64, its passage; then two more numbers: for tokens
        of the prompt without text, and for tokens after the prompt, which are the answer's."""
        special, answer = len(self.passages), len(self.passages) + 1
        numbers = np.full(n, answer)
        numbers[: len(self.ids)] = special
        for number, (first, last) in enumerate(self.passages):
            numbers[first:last] = number
        empty = [a == b for a, b in self.offsets][:n]
        numbers[: len(empty)][empty] = special
        return numbers

    def tokens_of(self, spans: Iterable[tuple[int, int]]) -> list[int]:
        """The tokens that share a character with one of the `spans` [start, end) of the text, in
        order: what `Attachment.keep` takes. ValueError for a span without text."""
        wanted = np.zeros(len(self.text) + 1, dtype=np.int64)  # +1 where a span begins, -1 ends
        for start, end in spans:
            valid = is_count(start, 0) and is_count(end, 0) and start < end <= len(self.text)
            allowed = f"characters [start, end) of the text, which has {len(self.text)}"
            require(valid, "spans", (start, end), allowed)
            wanted[start] += 1
            wanted[end] -= 1
        before = np.append(0, (wanted.cumsum()[:-1] > 0).cumsum())  # wanted characters before each
        ends = np.array(self.offsets, dtype=np.int64)
        return np.flatnonzero(before[ends[:, 1]] > before[ends[:, 0]]).tolist()

    def place_of_token(self, token: int) -> Place | None:
        """Where a token of the prompt stands; None if it stands for no text."""
        start, end = self.offsets[token]
        return None if start == end else self._place(start, end, self.owners[token])

    def place_of_passage(self, passage: int) -> Place:
        """Where a passage stands."""
        first, last = self.passages[passage]
        texts = [(a, b) for a, b in self.offsets[first:last] if a < b]
        owner = next(o for o, (a, b) in zip(self.owners[first:last], self.offsets[first:last],
                                            strict=True) if a < b)  # fmt: skip
        return self._place(texts[0][0], max(end for _, end in texts), owner)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, for `from_dict`."""
        plain = {name: getattr(self, name) for name in ("text", "ids", "offsets", "passages")}
        return plain | {"documents": [asdict(document) for document in self.documents]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Source:
        """The inverse of `to_dict`."""
        pairs = {name: tuple(map(tuple, content[name])) for name in ("offsets", "passages")}
        documents = tuple(Document(**document) for document in content["documents"])
        return cls(content["text"], tuple(content["ids"]), documents=documents, **pairs)

    def _place(self, start: int, end: int, owner: int) -> Place:
        """The place of prompt characters [start, end), without what lies outside their document."""
        if owner < 0:
            return Place(PROMPT, start, end, start, end)
        document = self.documents[owner]
        start, end = max(start, document.start), min(end, document.end)
        moved = document.offset - document.start
        return Place(document.name, start + moved, end + moved, start, end)


def find_documents(prompt: str, texts: Mapping[str, str]) -> list[Document]:
    """Where the texts of files {name: text} stand in a prompt, in order.

    ValueError for a text that is empty, or does not occur exactly once.
    """
    found = []
    for name, text in texts.items():
        count = prompt.count(text) if text else 0
        allowed = f"found once in the prompt, where the text of {name!r} occurs {count} times"
        require(count == 1, "texts", text, allowed)
        start = prompt.index(text)
        found.append(Document(name, start, start + len(text)))
    return sorted(found, key=lambda document: document.start)


def _check_documents(documents: Sequence[Document], length: int) -> None:
    before = 0
    for document in documents:
        allowed = f"in order, apart, not empty and within the prompt's {length} characters"
        valid = before <= document.start < document.end <= length and document.offset >= 0
        require(valid, "documents", document, allowed)
        before = document.end


def _flat(ids: Any) -> list[int]:
    """Ids (n,) or (1, n), a tensor or a list, as a list."""
    rows = np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)
    require(rows.ndim == 1 or rows.shape[:-1] == (1,), "ids", rows.shape, "of shape (n,) or (1, n)")
    return rows.reshape(-1).tolist()


def _encode(tokenizer: Any, text: str, ids: list[int] | None) -> Any:
    """The tokenizer's ids and offsets of a text, such as give `ids`."""
    readable = _SURROGATE.sub("\ufffd", text)  # one character for one: offsets stay
    for special in (True, False):
        encoded = tokenizer(
            readable, add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        if ids is None or encoded["input_ids"] == ids:
            return encoded
    raise AuditError(
        f"the {len(ids)} ids are not those of the text, which has {len(encoded['input_ids'])}: "
        "give the text that was tokenised, with the chat template and all; or ids without padding"
    )


def _owners(offsets: Sequence[tuple[int, int]], documents: Sequence[Document]) -> list[int]:
    """For each token the document that has its middle, -1 for none: a token that begins with the
    space before a document is the document's."""
    owners, number = [], 0
    for start, end in offsets:
        middle = (start + end) / 2
        while number < len(documents) and documents[number].end <= middle:
            number += 1
        inside = number < len(documents) and documents[number].start <= middle
        owners.append(number if inside else -1)
    return owners


def _passages(
    text: str,
    offsets: Sequence[tuple[int, int]],
    documents: Sequence[Document],
    most: int,
) -> tuple[tuple[int, int], ...]:
    owners = _owners(offsets, documents)
    tokens = [token for token, (start, end) in enumerate(offsets) if start < end]
    least = -(-len(tokens) // most)
    passages, first, size = [], None, 0
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        first = token if first is None else first
        size += 1
        if following is None or owners[following] != owners[token]:
            ends = True
        elif offsets[following][0] < offsets[token][1]:
            ends = False  # both are parts of one character
        else:
            start, end = offsets[token][0], offsets[following][0]
            ends = size >= max(least, _enough(text[start:end], text[end : end + 1]))
        if ends:
            passages.append((first, token + 1))
            first, size = None, 0
    return tuple(passages)


def _enough(piece: str, following: str) -> int:
    """Tokens from which on a passage may end with a piece of text before a character."""
    if "\n" in piece:
        return 1
    between = piece[-1:].isspace() or following.isspace()
    end = piece.rstrip()
    if end.endswith(_WIDE_ENDS) or between and end.endswith(_SENTENCE_ENDS):
        return _SENTENCE
    return _LONGEST if between else 2 * _LONGEST
