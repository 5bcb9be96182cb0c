"""How the chosen tokens are read at each budget: ranked, or half of them drawn by priority sampling
(Budget.sampled). Which is better depends on model, text and budget, so text decides that is not
scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hashattn.attention.budget import Budget
from hashattn.base.engines import InProcess
from hashattn.evaluation.fidelity import document, fidelity_protocol
from hashattn.evaluation.methods import Method
from hashattn.evaluation.runner import evaluate
from hashattn.pilot.plan import Plan
from hashattn.pilot.settings import PilotSettings
from hashattn.selectors.base import Selector

DENSE, SPARSE = "dense", "sparse"
SETUP = ("B",)  # the question sparse as well: what holds where many are asked over one prefill
_SAMPLED = 0.5  # of the heavy tokens, where tokens are drawn
_CONTEXTS = 2  # that decide


def methods(
    selector: Selector, settings: PilotSettings, sampled: Sequence[float] | None = None
) -> list[Method]:
    """Dense attention, and the selector at every budget, read as `sampled` says (`choose_reading`;
    None: ranked). Contexts too short to skip anything are read whole, and count so."""
    shares = [0.0] * len(settings.budgets) if sampled is None else sampled
    return [Method(DENSE)] + [
        Method(SPARSE, selector, _budget(settings, density, share), allow_dense=True)
        for density, share in zip(settings.budgets, shares, strict=True)
    ]


def choose_reading(
    model: Any, tokenizer: Any, plan: Plan, selector: Selector, settings: PilotSettings,
    folder: str | Path, progress: bool = True,
) -> tuple[float, ...]:  # fmt: skip
    """For each budget Budget.sampled, 0 or a half: what gives the lower KL to dense on contexts of
    calibration text. 0 where there is none, or the selector cannot estimate logits."""
    long = [context.text for context in plan.learning if context.tokens >= settings.least_tokens]
    texts = long[:_CONTEXTS]
    if not texts or not _estimates(model, selector):
        return (0.0,) * len(settings.budgets)
    ways = {0.0: "ranked", _SAMPLED: "sampled"}
    tried = [
        Method(name, selector, _budget(settings, density, share))
        for density in settings.budgets
        for share, name in ways.items()
    ]
    records = [document(text, "reading", str(number)) for number, text in enumerate(texts)]
    frame = evaluate(model, tokenizer, records, tried, reading_protocol(settings, 0),
                     Path(folder) / "reading.jsonl", progress, setups=SETUP,
                     engine=InProcess())  # fmt: skip
    kl = frame.groupby(["budget", "method"])["kl"].mean()
    labels = [method.budget_label for method in tried[:: len(ways)]]
    return tuple(min(ways, key=lambda way: kl[label, ways[way]]) for label in labels)


def reading_protocol(settings: PilotSettings, new_tokens: int) -> Any:
    """Fidelity over the last tokens of a context, then over `new_tokens` generated ones."""
    return fidelity_protocol(
        settings.text_tokens, max(1, new_tokens), sink=settings.sink, local=settings.local,
        seed=settings.seed,
    )  # fmt: skip


def _budget(settings: PilotSettings, density: float, share: float) -> Budget:
    return Budget(settings.sink, settings.local, density=density, sampled=share,
                  seed=settings.seed)  # fmt: skip


def _estimates(model: Any, selector: Selector) -> bool:
    from hashattn.models.structure import full_attention_layers

    return all(selector.estimates_logits(layer) for layer in full_attention_layers(model))
