"""Methods to compare, and what each one read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hashattn.attention.budget import Budget
from hashattn.attention.receipt import Receipt
from hashattn.base.checks import require
from hashattn.base.errors import SparsePathError
from hashattn.base.files import write_text
from hashattn.evaluation.protocol import Protocol
from hashattn.selectors.base import Selector

_DENSE = "dense"  # the budget's label of a method without one


@dataclass(frozen=True)
class Method:
    """One method to compare: a selector at a budget, or dense attention without either.

    Several methods may share a name at different budgets. allow_dense: accept that all cached
    tokens were read (short contexts); allow_untrained: accept random hash weights. Raises
    ValueError when a sparse selector has no budget, or dense attention has one.
    """

    name: str
    selector: Selector | None = None
    budget: Budget | None = None
    allow_dense: bool = False
    allow_untrained: bool = False

    def __post_init__(self) -> None:
        if self.sparse != (self.budget is not None):
            need = "a budget" if self.sparse else "no budget, dense attention reads everything"
            raise ValueError(f"method {self.name!r} needs {need}; got budget = {self.budget!r}")

    @property
    def sparse(self) -> bool:
        """Whether the method needs attach."""
        return self.selector is not None and self.selector.sparse

    @property
    def budget_label(self) -> str:
        """ "16x" for a density of 1/16, "32 tokens" for a heavy budget, "dense" without one."""
        if self.budget is None:
            return _DENSE
        if self.budget.density is not None:
            return f"{1 / self.budget.density:g}x"
        return f"{self.budget.heavy} tokens"

    def record(self) -> dict[str, Any]:
        """What decides this method's results; its name does not."""
        if not self.sparse:
            return {"selector": None, "budget": None}
        return {"selector": self.selector.record(), "budget": asdict(self.budget)}


def check_methods(methods: Sequence[Method], protocol: Protocol) -> None:
    """ValueError unless names and budgets tell the methods apart and fit the protocol."""
    require(len(methods) > 0, "methods", methods, "at least one Method")
    counts = Counter((method.name, method.budget_label) for method in methods)
    repeated = sorted(label for label, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"methods {repeated} appear more than once; give them different names")
    for method in methods:
        budget = method.budget
        if budget and (budget.sink, budget.local) != (protocol.sink, protocol.local):
            raise ValueError(
                f"method {method.name!r} has sink {budget.sink} and local {budget.local}, the "
                f"protocol {protocol.sink} and {protocol.local}; use protocol.budget(...)"
            )


def row_from_receipt(method: Method, receipt: Receipt | None, tokens: int) -> dict[str, Any]:
    """What one sample read, from its receipt; without one (dense), all cached `tokens`.

    density is over the sparse calls; tokens_read and tokens_cached are sums over all decode calls
    of all layers, so that dense layers count. Raises SparsePathError when decode calls were made
    and none was sparse.
    """
    if receipt is None:
        stored = {"auxiliary_bits": 0.0, "nominal_bits": 0.0, "receipt": None}
        return {"density": 1.0, "tokens_read": tokens, "tokens_cached": tokens} | stored
    if receipt.decode_calls and not receipt.sparse_calls:
        raise SparsePathError(
            f"method {method.name!r}: no decode call was sparse; dense calls by reason: "
            f"{receipt.dense_reasons}; check the model's layers and the protocol's dense_layers"
        )
    return {
        "density": receipt.density,
        "tokens_read": receipt.tokens_read,
        "tokens_cached": receipt.tokens_cached,
        # None where no decode call was made
        "auxiliary_bits": receipt.auxiliary_bits or 0.0,
        "nominal_bits": receipt.nominal_bits or 0.0,
        "receipt": {
            "method": receipt.method,
            "settings": receipt.settings,
            "environment": receipt.environment,
            "sparse_calls": receipt.sparse_calls,
            "dense_calls": receipt.dense_reasons,
        },
    }


def verify(method: Method, rows: Sequence[dict[str, Any]]) -> None:
    """SparsePathError when a sparse method skipped no token in any sample, unless allow_dense."""
    if not method.sparse or method.allow_dense:
        return
    if sum(row["tokens_read"] for row in rows) >= sum(row["tokens_cached"] for row in rows):
        raise SparsePathError(
            f"method {method.name!r} at {method.budget_label} read every cached token of all "
            f"{len(rows)} samples: lower the budget {method.budget}, use longer contexts, or set "
            "allow_dense=True"
        )


def receipt_summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One summary receipt for each setup, method and budget, over all samples with a receipt."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["receipt"] is not None:
            groups.setdefault((row["setup"], row["method"], row["budget"]), []).append(row)
    return [_summary(*labels, group) for labels, group in groups.items()]


def save_receipts(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes receipt_summary(rows) as JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(receipt_summary(rows), indent=1) + "\n")


def _summary(setup: str, name: str, budget: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    read, cached = (sum(row[f"tokens_{what}"] for row in rows) for what in ("read", "cached"))
    receipts = [row["receipt"] for row in rows]
    dense = sum((Counter(receipt["dense_calls"]) for receipt in receipts), Counter())
    return {
        "setup": setup,
        "method": name,
        "budget": budget,
        "samples": len(rows),
        "density": read / cached if cached else 1.0,
        "tokens_read": read,
        "tokens_cached": cached,
        "sparse_calls": sum(receipt["sparse_calls"] for receipt in receipts),
        "dense_calls": dict(sorted(dense.items())),
        "auxiliary_bits": max(row["auxiliary_bits"] for row in rows),
        "nominal_bits": max(row["nominal_bits"] for row in rows),
        "selector": receipts[0]["method"],
        "settings": {k: v for k, v in receipts[0]["settings"].items() if k != "sparse_rows"},
        "environments": _distinct(receipt["environment"] for receipt in receipts),
    }


def _distinct(values: Any) -> list[Any]:
    texts = dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)
    return [json.loads(text) for text in texts]
