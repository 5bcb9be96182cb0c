"""Learned-hash sparse attention for Hugging Face models (HashAttention).

Names are imported when they are first used, so that `import hashattn` stays light.
"""

from importlib import import_module

_EXPORTS = {
    "Attachment": "hashattn.attention.attachment",
    "attach": "hashattn.attention.attachment",
    "ask": "hashattn.attention.contexts.asking",
    "Budget": "hashattn.attention.budget",
    "Context": "hashattn.attention.contexts.context",
    "detach": "hashattn.attention.attachment",
    "Fallback": "hashattn.attention.fallback",
    "HashAttnError": "hashattn.base.errors",
    "HashSelector": "hashattn.selectors.hash",
    "HashWeights": "hashattn.hashing.weights",
    "measure_break_even": "hashattn.attention.attachment",
    "Memory": "hashattn.attention.memory",
    "Receipt": "hashattn.attention.receipt",
    "SparsePathError": "hashattn.base.errors",
    "make_selector": "hashattn.selectors",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
