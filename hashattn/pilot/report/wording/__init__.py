"""A report's words, one module a language: `TEXTS` of the page itself, `SENTENCES` by the keys that
results hold. Templates are `str.format`'s, with the specs of `_SPECS` for numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from string import Formatter
from typing import Any

from hashattn.base.checks import is_number
from hashattn.pilot.report import numbers
from hashattn.pilot.report.result import ReportError
from hashattn.pilot.report.visible import visible

_OWN = {
    "en": "hashattn.pilot.report.wording.english",
    "ja": "hashattn.pilot.report.wording.japanese",
}
# of the pilot's other parts: module, and its dicts {language: {key: template}}
_OTHERS = {
    "capacity": ("hashattn.pilot.capacity.wording", "SENTENCES"),
    "quantities": ("hashattn.pilot.capacity.wording", "LABELS"),
    "documents": ("hashattn.pilot.documents.wording", "SENTENCES"),
}

_SPECS: dict[str, Callable[[Any], str]] = {
    "ratio": numbers.significant,
    "percent": numbers.percent,
    "fraction": numbers.fraction,
    "points": numbers.points,
    "score": numbers.score,
    "loss": numbers.loss,
    "count": numbers.count,
    "size": numbers.size,
    "duration": numbers.duration,
}


class Words:
    """The words of one language: `text` of the page, `sentence` of what a result says by key."""

    def __init__(self, language: str):
        self.language = language
        self._texts = import_module(_OWN[language]).TEXTS
        self._formatter = _Numbers(self._texts)

    def __call__(self, key: str, **values: Any) -> str:
        """A text of the page; KeyError for one that is not there, which is a mistake here."""
        return self._formatter.vformat(self._texts[key], (), values)

    def has(self, key: str) -> bool:
        return key in self._texts

    def sentence(self, item: Mapping[str, Any], of: str = "report") -> str:
        """The sentence of {"key", "values"}, whose template stands in the part `of` the pilot;
        `<key>_untold` is taken where it is there and a value is null. ReportError for a key without
        a sentence, or a value that it lacks."""
        key, values, known = item["key"], item.get("values") or {}, sentences(of, self.language)
        if None in values.values() and f"{key}_untold" in known:
            key = f"{key}_untold"
        if key not in known:
            raise ReportError(f"there is no sentence of {of} for {key!r} in {self.language!r}")
        try:
            return self._formatter.vformat(known[key], (), values)
        except (LookupError, TypeError, ValueError) as problem:
            raise ReportError(
                f"the sentence {key!r} does not fit its values {values!r} ({problem})"
            ) from problem


@cache
def sentences(of: str, language: str) -> Mapping[str, str]:
    """Templates by key: `of` "report" its own, of other parts of the pilot theirs."""
    if of == "report":
        return import_module(_OWN[language]).SENTENCES
    module, name = _OTHERS[of]
    return getattr(import_module(module), name)[language]


class _Numbers(Formatter):
    """str.format with the specs of numbers, `budget` and `name`; null is a dash."""

    def __init__(self, texts: Mapping[str, str]):
        self._texts = texts

    def format_field(self, value: Any, spec: str) -> str:
        if value is None:
            return numbers.NONE
        if spec == "budget":
            return self._budget(value)
        if spec.startswith("name"):  # name:x reads the text x.<value>
            return self._texts[f"{spec.removeprefix('name ') or 'name'}.{value}"]
        if spec in _SPECS:
            return _SPECS[spec](value)
        if spec == "" and is_number(value) and not isinstance(value, int):
            return numbers.significant(value)
        shown = super().format_field(value, spec)
        return visible(shown) if isinstance(value, str) else shown

    def _budget(self, share: float) -> str:
        shown = numbers.fraction(share)
        key = "budget.one_of" if "/" in shown else "budget.share"
        return self._texts[key].format(n=shown.removeprefix("1/"), share=shown)
