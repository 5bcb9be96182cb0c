"""Records of what a run really read."""

from .receipt import Receipt

__all__ = ["Receipt"]
