"""Texts that others wrote, made fit to be shown: nothing hidden, nothing that turns its neighbours,
not too long."""

from __future__ import annotations

import re
import unicodedata

NAME, TEXT = 90, 280  # characters shown of a name, of a question or an answer
_SPACE = re.compile(r"[ \t\r\n\v\f\u0085\u00a0\u2028\u2029]+")
_HIDDEN = {
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
}  # control, format, half surrogate pair, private, unassigned
_JOINERS = {"\u200d", "\u200c"}  # within emoji and Persian words, not by themselves harmful


def visible(text: str) -> str:
    """One line: spaces and line ends as single spaces, characters that cannot be seen or that turn
    the direction of text as ⟨U+…⟩."""
    text = _SPACE.sub(" ", text).strip()
    return "".join(
        f"\u27e8U+{ord(c):04X}\u27e9"
        if unicodedata.category(c) in _HIDDEN and c not in _JOINERS
        else c
        for c in text
    )


def short(text: str, limit: int = TEXT) -> str:
    """`visible`, and cut to `limit` characters, the last of which says so."""
    shown = visible(text[: 4 * limit])
    if len(shown) <= limit and len(text) <= 4 * limit:
        return shown
    return shown[: limit - 1].rstrip() + "\u2026"
