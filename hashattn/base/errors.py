"""Errors that users meet. Each message says what is wrong and what to do next."""


class HashAttnError(Exception):
    """Base class of every error that hashattn raises on purpose."""


class SparsePathError(HashAttnError, RuntimeError):
    """A run that was meant to be sparse read the cache densely."""


class UnsupportedModelError(HashAttnError, ValueError):
    """The model, or the way it is called, is outside what sparse attention supports."""


class AttachmentError(HashAttnError, RuntimeError):
    """attach and detach were called in an order that cannot work."""


class HashWeightsError(HashAttnError, ValueError):
    """Hash weights are missing, damaged, untrained or made for another model."""


class ReceiptError(HashAttnError, ValueError):
    """A receipt file cannot be read."""


class NonFiniteError(HashAttnError, ArithmeticError):
    """The model computes NaN or infinite keys or values, which cannot be ranked."""


class MemoryLimitError(HashAttnError, RuntimeError):
    """Keys and values need more memory than was given, or than a disk has."""


class ContextError(HashAttnError, ValueError):
    """A saved context is missing, damaged, or made by another model or for another tokenizer."""
