"""Numbers as people read them: two significant digits, whole points, no more certainty than there
is. What is written here is the same in every language; units that are words stand in `wording`."""

from __future__ import annotations

import math

_MINUS = "\u2212"
NONE = "\u2013"  # stands for a number that is not known
_SMALL = 1e-4


def significant(value: float, digits: int = 2) -> str:
    """Rounded to `digits` significant digits, thousands separated: 1.27 as "1.3", 12345 as
    "12,000", 0.0042 as it is; below 0.0001 only that."""
    if value == 0:
        return "0"
    if abs(value) < _SMALL:
        return f"<{_SMALL}" if value > 0 else f">{_MINUS}{_SMALL}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    # 0.0999 becomes 0.10: one digit more to the left, one fewer to the right
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, decimals)}f}".replace("-", _MINUS)


def percent(share: float) -> str:
    """A share as whole percent; two digits below one percent, and nothing that is not 0 or all is
    shown as 0 or all."""
    if 0 < abs(share) < 0.01:
        return f"{significant(100 * share)}%"
    if 0.995 <= share < 1:
        return ">99%"
    return f"{100 * share:,.0f}%".replace("-", _MINUS)


def fraction(share: float) -> str:
    """A density as "1/16", or in percent where it is not one token of a whole number."""
    whole = round(1 / share) if share > 0 else 0
    if whole and abs(share * whole - 1) < 0.02:
        return f"1/{whole}"
    return percent(share)


def points(difference: float) -> str:
    """A difference of scores in 0..1 as signed whole points of 100."""
    whole = round(100 * difference)
    return f"+{whole}" if whole > 0 else f"{_MINUS}{-whole}" if whole < 0 else "0"


def score(value: float) -> str:
    """A score in 0..1 as whole points of 100."""
    return f"{100 * value:.0f}"


def loss(low: float) -> str:
    """The points of 100 that may be lost, from the low end of a difference: rounded up, so that
    the sentence "not more than this" holds."""
    return str(max(0, math.ceil(-100 * low - 1e-9)))


def count(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}".replace("-", _MINUS)


def size(value: float) -> str:
    """Bytes as "23 kB" or "1.3 GB", of 1000 each."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            digits = f"{value:.0f}" if unit == "B" or abs(value) >= 99.5 else significant(value)
            return f"{digits} {unit}"
        value /= 1000
    raise AssertionError("not reached: TB ends the loop")


def duration(seconds: float) -> str:
    """Seconds as "45 s", "7 min 11 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
