"""RULER's 13 tasks by their published parameters (NVIDIA/RULER, scripts/synthetic.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hashattn.base.checks import require_one_of
from hashattn.base.errors import HashAttnError


class RulerError(HashAttnError, ValueError):
    """A RULER sample cannot be generated, or a RULER file cannot be read."""


@dataclass(frozen=True)
class Retrieval:
    """Needles in a haystack: `values` values for each of `keys` keys, `queries` of which are asked.

    haystack: "noise" (a few repeated sentences), "text" (any prose) or "needles" (the needle's
    sentence about other keys). key, value: "words", "numbers" or "uuids".
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    max_new_tokens: ClassVar[int] = 128
    metric: ClassVar[str] = "string_match_all"


@dataclass(frozen=True)
class Tracking:
    """One chain of variables, each but the first assigned from the one before, in noise."""

    hops: int = 4

    max_new_tokens: ClassVar[int] = 30
    metric: ClassVar[str] = "string_match_all"


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which `common` words occur more often than all others."""

    common: int = 10

    max_new_tokens: ClassVar[int] = 120
    metric: ClassVar[str] = "string_match_all"


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose frequencies fall as rank ** -2; ranks 2 to `asked` + 1 are asked for."""

    letters: int = 6
    asked: int = 3

    max_new_tokens: ClassVar[int] = 50
    metric: ClassVar[str] = "string_match_all"


@dataclass(frozen=True)
class Answering:
    """Questions about documents among distractors; dataset: "squad" or "hotpotqa"."""

    dataset: str

    max_new_tokens: ClassVar[int] = 32
    metric: ClassVar[str] = "string_match_part"


Task = Retrieval | Tracking | CommonWords | FrequentWords | Answering

TASKS: dict[str, Task] = {
    "niah_single_1": Retrieval("noise"),
    "niah_single_2": Retrieval("text"),
    "niah_single_3": Retrieval("text", value="uuids"),
    "niah_multikey_1": Retrieval("text", keys=4),
    "niah_multikey_2": Retrieval("needles"),
    "niah_multikey_3": Retrieval("needles", key="uuids", value="uuids"),
    "niah_multivalue": Retrieval("text", values=4),
    "niah_multiquery": Retrieval("text", keys=4, queries=4),
    "vt": Tracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": Answering("squad"),
    "qa_2": Answering("hotpotqa"),
}

SHORT = 4096  # below this length RULER shortens the lists of cwe


def task_of(name: str) -> Task:
    """The parameters of a task; RulerError for a name that is not in TASKS."""
    require_one_of("task", name, TASKS, RulerError)
    return TASKS[name]
