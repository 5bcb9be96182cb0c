"""One row of a table of methods: what a selector stores, needs and does with its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hashattn.base.checks import require

if TYPE_CHECKING:
    from hashattn.selectors.base import Selector


def describe(selector: Selector, group: int, head_dim: int) -> dict[str, Any]:
    """What to know about a selector before it runs, JSON-able.

    Keys: name; nominal_bits and auxiliary_bits, needed and stored here per token per KV head for
    `group` query heads a KV head and `head_dim` channels; tokens, "evicts" (a token once dropped
    never returns), "retrieves" (any cached token may be read at every step) or "reads all" (dense);
    needs, "nothing", "calibration" or "training"; parameters. Raises ValueError for a group or
    head_dim below 1.
    """
    for name, value in (("group", group), ("head_dim", head_dim)):
        require(value >= 1, name, value, "at least 1")
    return {
        "name": selector.name,
        "nominal_bits": float(selector.nominal_bits(group, head_dim)),
        "auxiliary_bits": float(selector.auxiliary_bits(group, head_dim)),
        "tokens": _tokens(selector),
        "needs": selector.needs,
        "parameters": dict(selector.record()["parameters"]),
    }


def _tokens(selector: Selector) -> str:
    if not selector.sparse:
        return "reads all"
    return "evicts" if selector.evicts else "retrieves"
