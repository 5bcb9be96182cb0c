"""Selectors: methods of ranking cached tokens, one a file, all behind hashattn.selectors.base.

The methods are the modules that METHODS names. The others help them, from the ground up:

plan            what a call may choose from
base            the interface: Selector, and KeyView, its view of a cache
usual           what a method's usual setting is made from, and its style in figures
describe        one row of a table of methods
calibration     means, covariances and content hashes of captured queries and keys
hyperplanes     random normals by seed and layer
grids           uniform grids per channel, for methods that quantise keys or bounds
logits          exact or estimated logits as scores, per query head or for a group
codes           selectors by the Hamming distance of codes: hash, transform, rabitq, hata, lsh
observed        selectors by the attention they saw: h2o, snapkv, infllm
wrapper         selectors on top of another one: rerank, residual, certified
slopes          scores as attention logits, for drawing tokens by them
variants        names of the hash selector with other weights

A new method takes three places: its file, with a dataclass of its settings and what it ranks by; a
line in METHODS; a test. It defines `usual` and `style` where the defaults do not fit.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hashattn.base.checks import require_one_of
from hashattn.base.lazy import lazy
from hashattn.selectors.describe import describe  # eagerly, or the name would be the module
from hashattn.selectors.variants import HASH_VARIANTS

if TYPE_CHECKING:
    from hashattn.selectors.usual import UsualContext

# name: (module, class); imported on first use, so that one method does not load them all
METHODS = {
    "dense": ("hashattn.selectors.dense", "DenseSelector"),
    "oracle": ("hashattn.selectors.oracle", "OracleSelector"),
    "oracle_top_p": ("hashattn.selectors.oracle_top_p", "OracleTopPSelector"),
    "window": ("hashattn.selectors.window", "WindowSelector"),
    "random": ("hashattn.selectors.random", "RandomSelector"),
    "hash": ("hashattn.selectors.hash", "HashSelector"),
    "transform": ("hashattn.selectors.transform", "TransformSelector"),
    "rabitq": ("hashattn.selectors.rabitq", "RaBitQSelector"),
    "lsh": ("hashattn.selectors.lsh", "LSHSelector"),
    "double_sparsity": ("hashattn.selectors.double_sparsity", "DoubleSparsitySelector"),
    "quest": ("hashattn.selectors.quest", "QuestSelector"),
    "streaming_llm": ("hashattn.selectors.window", "StreamingLLMSelector"),
    "h2o": ("hashattn.selectors.h2o", "H2OSelector"),
    "snapkv": ("hashattn.selectors.snapkv", "SnapKVSelector"),
    "infllm": ("hashattn.selectors.infllm", "InfLLMSelector"),
    "socket": ("hashattn.selectors.socket", "SocketSelector"),
    "hata": ("hashattn.selectors.hata", "HATASelector"),
    "magicpig": ("hashattn.selectors.magicpig", "MagicPIGSelector"),
    "rerank": ("hashattn.selectors.rerank", "RerankSelector"),
    "residual": ("hashattn.selectors.residual", "ResidualSelector"),
    "certified": ("hashattn.selectors.certified", "CertifiedSelector"),
    "sparq": ("hashattn.selectors.sparq", "SparQSelector"),
    "loki": ("hashattn.selectors.loki", "LokiSelector"),
    "pqcache": ("hashattn.selectors.pqcache", "PQCacheSelector"),
}
_CLASSES = {cls: module for module, cls in METHODS.values()}
_CLASSES |= {"Selector": "hashattn.selectors.base", "KeyView": "hashattn.selectors.base"}
_CLASSES["CodeSelector"] = "hashattn.selectors.codes"
_CLASSES["SelectionPlan"] = "hashattn.selectors.plan"
_CLASSES["fit_slopes"] = "hashattn.selectors.slopes"
_CLASSES |= dict.fromkeys(("MethodStyle", "UsualContext"), "hashattn.selectors.usual")

__all__ = [
    "HASH_VARIANTS", "METHODS", "describe", "make_selector", "selector_class", "usual_selector",
    *sorted(_CLASSES),
]  # fmt: skip


def selector_class(name: str) -> Any:
    """The class of the method called `name`, a key of METHODS; ValueError for any other name."""
    require_one_of("selector", name, sorted(METHODS))
    module, cls = METHODS[name]
    return getattr(import_module(module), cls)


def usual_selector(name: str, context: UsualContext) -> Any:
    """The method or hash variant called `name` in its usual setting.

    Raises ValueError for any other name, and for a variant whose weights the context lacks.
    """
    if name not in HASH_VARIANTS:
        return selector_class(name).usual(context)
    codes = HASH_VARIANTS[name].codes
    if codes not in context.codes:
        raise ValueError(f"{name} needs the hash weights called {codes!r} in the context's codes")
    return selector_class("hash").as_trained(context.codes[codes])


def make_selector(name: str, **parameters: Any) -> Any:
    """The selector called `name` (a key of METHODS), built with its own parameters.

    Raises ValueError for any other name, or a parameter that the method does not take.
    """
    cls = selector_class(name)
    try:
        return cls(**parameters)
    except TypeError as error:
        names = sorted(parameters)
        raise ValueError(f"selector {name!r} with parameters {names}: {error}") from error


__getattr__ = lazy(__name__, _CLASSES)
