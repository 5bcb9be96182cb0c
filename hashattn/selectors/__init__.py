"""Selectors: one method of ranking cached tokens a file, all behind hashattn.selectors.base."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hashattn.selectors.describe import describe  # a function, else the name is the module

# name: (module, class); imported when asked for, so that one method does not load them all
METHODS = {
    "dense": ("hashattn.selectors.dense", "DenseSelector"),
    "oracle": ("hashattn.selectors.oracle", "OracleSelector"),
    "oracle_top_p": ("hashattn.selectors.oracle_top_p", "OracleTopPSelector"),
    "window": ("hashattn.selectors.window", "WindowSelector"),
    "random": ("hashattn.selectors.random", "RandomSelector"),
    "hash": ("hashattn.selectors.hash", "HashSelector"),
    "lsh": ("hashattn.selectors.lsh", "LSHSelector"),
    "double_sparsity": ("hashattn.selectors.double_sparsity", "DoubleSparsitySelector"),
    "quest": ("hashattn.selectors.quest", "QuestSelector"),
    "streaming_llm": ("hashattn.selectors.window", "WindowSelector"),
    "h2o": ("hashattn.selectors.h2o", "H2OSelector"),
    "snapkv": ("hashattn.selectors.snapkv", "SnapKVSelector"),
    "infllm": ("hashattn.selectors.infllm", "InfLLMSelector"),
    "socket": ("hashattn.selectors.socket", "SocketSelector"),
    "hata": ("hashattn.selectors.hata", "HATASelector"),
    "magicpig": ("hashattn.selectors.magicpig", "MagicPIGSelector"),
    "rerank": ("hashattn.selectors.rerank", "RerankSelector"),
    "residual": ("hashattn.selectors.residual", "ResidualSelector"),
    "sparq": ("hashattn.selectors.sparq", "SparQSelector"),
    "loki": ("hashattn.selectors.loki", "LokiSelector"),
    "pqcache": ("hashattn.selectors.pqcache", "PQCacheSelector"),
}
_CLASSES = {cls: module for module, cls in METHODS.values()}
_CLASSES |= {"Selector": "hashattn.selectors.base", "KeyView": "hashattn.selectors.base"}
_CLASSES["CodeSelector"] = "hashattn.selectors.codes"
_CLASSES["SelectionPlan"] = "hashattn.selectors.plan"

__all__ = ["METHODS", "describe", "make_selector", *sorted(_CLASSES)]


def make_selector(name: str, **parameters: Any) -> Any:
    """The selector called `name` (a key of METHODS), built with its own parameters.

    Raises ValueError for a name that no method has, or a parameter that the method does not take.
    """
    if name not in METHODS:
        raise ValueError(f"selector = {name!r} must be one of {sorted(METHODS)}")
    module, cls = METHODS[name]
    try:
        return getattr(import_module(module), cls)(**parameters)
    except TypeError as error:
        given = sorted(parameters)
        raise ValueError(f"selector {name!r} with parameters {given}: {error}") from error


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_CLASSES[name]), name)
