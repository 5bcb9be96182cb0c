"""What a reader of one kind of file gives: pieces of text, its encoding, notes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_ENDS = re.compile("\r\n?|[\f\v\x85\u2028\u2029]")
# halves of surrogate pairs, and controls but tab and line feed: no part of any text
_NOISE = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufeff]")


@dataclass
class Reading:
    """pieces: of the text, each ends a line; read lazily, so what is past a limit costs no time.

    encoding: of the file's characters, None where its format fixes it. notes: (key, values) of
    what was left out, complete once the pieces are read. empty: key for a file without any text.
    """

    pieces: Iterable[str]
    encoding: str | None = None
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    empty: str = "empty"

    def text(self, most: int) -> tuple[str, bool]:
        """The first `most` characters, cleaned, no empty lines around; whether there are more."""
        kept, size = [], -1  # the last line end does not count
        for piece in self.pieces:
            piece = cleaned(piece).rstrip("\n")
            if not kept:
                piece = piece.lstrip("\n")
            if piece or kept:
                kept.append(piece)
                size += len(piece) + 1
            if piece and size > most:
                break
        text = "\n".join(kept).rstrip("\n")
        return text[:most], len(text) > most


def cleaned(text: str) -> str:
    """Line ends as \\n; NUL, other control characters, half surrogate pairs and byte-order marks
    removed. Not normalised (NFC, NFKC): the model would read these characters as they are, and a
    pilot is to judge the documents as they are."""
    return _NOISE.sub("", _ENDS.sub("\n", text))
