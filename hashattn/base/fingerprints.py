"""What an artefact was made for, against what it is used with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def require_same(
    what: str, stated: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]],
    error: type[Exception], remedy: str,
) -> None:  # fmt: skip
    """Raise `error` naming the first part of a fingerprint in which `now` differs, and how.

    stated, now: {"model": {...}, "method": {...}, ...}, JSON-able, with the same parts.
    """
    for part, ours in stated.items():
        names = sorted(k for k in {*ours, *now[part]} if ours.get(k) != now[part].get(k))
        if names:
            there, here = _shown(ours, names), _shown(now[part], names)
            raise error(f"this {what} is of another {part}: {there} there, {here} here; {remedy}")


def _shown(part: Mapping[str, Any], names: list[str]) -> str:
    """The named entries, long ones shortened."""
    return ", ".join(f"{name} {str(part.get(name))[:40]}" for name in names)
