"""A prompt in its three parts, and what every task's sample offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from hashattn.evaluation.benchmarks.ruler.styles import Wording


@dataclass(frozen=True)
class Prompt:
    """text (instruction and haystack, ending in a line break), question, opening of the answer."""

    text: str
    question: str
    prefix: str

    def __str__(self) -> str:
        return self.text + self.question + self.prefix


class Sample(Protocol):
    """One sample of a task, at whatever size of haystack.

    answers: the references. smallest: least size. step: the first step of the search for the
    largest size that fits.
    """

    answers: tuple[str, ...]
    smallest: int
    step: int

    def prompt(self, size: int, fill: int = 0) -> Prompt:
        """The sample with `size` units of haystack; equal arguments, equal prompts.

        fill: smaller units on top, where one unit can be more than 1 % of a prompt.
        """


def worded(wording: Wording, context: str, **values: Any) -> Prompt:
    """A wording around a context."""
    before, after = wording.text.split("{context}")  # not formatted in: a context may hold braces
    return Prompt(
        before.format(**values) + context + after.format(**values),
        wording.question.format(**values),
        wording.prefix.format(**values),
    )


def listed(items: list[str]) -> str:
    """a; a, and b; a, b, and c."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


class GrowingText:
    """A list that is drawn as it is needed."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw, self._drawn = draw, []

    def first(self, count: int) -> list[str]:
        while len(self._drawn) < count:
            self._drawn.append(self._draw())
        return self._drawn[:count]
