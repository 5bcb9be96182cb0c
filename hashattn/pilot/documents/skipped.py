"""Why a file, or a part of one, was not read: a key and values, from which a sentence is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hashattn.base.checks import require_one_of
from hashattn.base.errors import HashAttnError
from hashattn.pilot.documents.wording import SENTENCES


class DocumentsError(HashAttnError, ValueError):
    """There is no folder to read, nothing in it, or a package that reads it is missing."""


class Refused(Exception):
    """A file is not read; key, values: of its sentence."""

    def __init__(self, key: str, **values: Any) -> None:
        super().__init__(key, values)
        self.key, self.values = key, values


@dataclass(frozen=True)
class Skipped:
    """A file of which nothing, or not all, was read.

    name: of the file below the folder; "*.png" and the like stand for all files of a kind. key,
    values: of its sentence in `wording.SENTENCES`.
    """

    name: str
    key: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """What is wrong and what to do, in English."""
        return self.say("en")

    def say(self, language: str) -> str:
        """What is wrong and what to do; language: "en" or "ja", else ValueError."""
        require_one_of("language", language, SENTENCES)
        return SENTENCES[language][self.key].format(**self.values)
