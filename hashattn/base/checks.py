"""Checks of a field's value, with one form of message: `field = value: must be ...`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any

INT32_MAX = 2**31 - 1  # token indices are int32, so no number of tokens is larger

_SHOWN = 200  # characters of a value that a message repeats


def require(
    valid: bool, field: str, value: Any, allowed: str, error: type[Exception] = ValueError
) -> None:
    """Unless valid, raise `error` naming the field, its value (shortened) and what it must be."""
    if not valid:
        text = repr(value)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise error(f"{field} = {shown}: must be {allowed}")


def require_one_of(
    field: str, value: Any, allowed: Collection[Any], error: type[Exception] = ValueError
) -> None:
    """`require` that a value is one of the allowed ones."""
    names = ", ".join(map(str, allowed))
    require(value in tuple(allowed), field, value, f"one of {names}", error)


def is_count(value: Any, least: int = 1, most: int | None = None) -> bool:
    """An int of at least `least` and at most `most`; True and False do not count."""
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= least
        and (most is None or value <= most)
    )


def is_number(value: Any) -> bool:
    """A finite real number; True and False do not count."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require_numbers(
    values: Mapping[str, Any],
    *,
    counts: Mapping[str, int] = MappingProxyType({}),
    shares: Collection[str] = (),
    positive: Collection[str] = (),
    not_negative: Collection[str] = (),
) -> None:
    """ValueError naming the first of `values`, by field, that is not the number its field needs.

    counts: the least integer of each; shares: in 0..1. A field is checked as the first kind that
    names it, and not at all if none does.
    """
    for field, value in values.items():
        if field in counts:
            allowed = f"an integer of at least {counts[field]}"
            require(is_count(value, counts[field]), field, value, allowed)
        elif field in shares:
            require(is_number(value) and 0 <= value <= 1, field, value, "a number in 0..1")
        elif field in positive:
            require(is_number(value) and value > 0, field, value, "a number above 0")
        elif field in not_negative:
            require(is_number(value) and value >= 0, field, value, "a number of at least 0")


def is_text(value: Any, *, empty: bool = False) -> bool:
    """A str that can be written as UTF-8, and is not "" unless `empty`."""
    if not isinstance(value, str) or not (value or empty):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON's "\ud800" gives
        return False
    return True


def is_file_name(value: Any) -> bool:
    """A text that is one part of a path: no separators, no leading dot, nothing unprintable."""
    return (
        is_text(value)
        and value.isprintable()
        and value == value.strip()
        and not value.startswith(".")
        and not {"/", "\\"} & set(value)
        and len(value.encode()) <= 200  # file systems take 255 bytes, suffixes included
    )
