"""Sparse attention inside transformers: the budget, the indexed cache and attach."""

from hashattn.attention.budget import Budget

__all__ = ["Attachment", "Budget", "attach", "detach"]


def __getattr__(name: str) -> object:
    """Imports transformers only when attach, detach or Attachment is used."""
    if name in ("attach", "Attachment", "detach"):
        from hashattn.attention import attachment

        return getattr(attachment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
