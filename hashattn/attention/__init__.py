"""Sparse attention inside transformers: the budget, the indexed cache and attach."""

from .budget import Budget

__all__ = ["Attachment", "Budget", "attach", "detach"]


def __getattr__(name: str) -> object:
    """Import transformers only when attach is asked for."""
    if name in ("attach", "Attachment", "detach"):
        from . import sparse

        return getattr(sparse, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
