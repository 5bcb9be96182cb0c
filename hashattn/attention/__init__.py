"""Sparse attention inside transformers: the budget, the indexed cache and attach."""

from hashattn.attention.budget import Budget

__all__ = ["Attachment", "Budget", "attach", "detach", "measure_break_even"]


def __getattr__(name: str) -> object:
    """Imports transformers only when a name that needs it is used."""
    if name in ("attach", "Attachment", "detach", "measure_break_even"):
        from hashattn.attention import attachment

        return getattr(attachment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
