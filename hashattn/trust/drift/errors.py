"""The error of this folder."""

from hashattn.base.errors import HashAttnError


class DriftError(HashAttnError, ValueError):
    """A drift reference is damaged, too small, or of another model, method or budget."""
