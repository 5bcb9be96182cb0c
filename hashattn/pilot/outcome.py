"""A pilot's result as one JSON value, which the report is written from."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hashattn.base.environment import machine
from hashattn.base.repository import repository
from hashattn.evaluation.methods import Method
from hashattn.models.identity import code_version, model_sha256
from hashattn.pilot.codes import PilotCodes
from hashattn.pilot.judgement import FALLBACK, GO, Judgement, cut_contexts
from hashattn.pilot.plan import Plan
from hashattn.pilot.privacy import is_guarded
from hashattn.pilot.settings import PilotSettings

if TYPE_CHECKING:
    from hashattn.pilot.capacity import Preflight
    from hashattn.pilot.documents import Library

FORMAT = 1


def pilot_result(
    model: Any, library: Library, plan: Plan, codes: PilotCodes, judgement: Judgement,
    preflight: Preflight, settings: PilotSettings, *, tried: Sequence[Method],
    latency: dict[str, Any] | None, changed: Sequence[dict[str, Any]], title: str, language: str,
    note: str, name: str, command: str, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """All that report.save_report writes, plain JSON values.

    tried: what was measured (reading.methods). note: what the model is ("embedded", "pretrained" or
    "own"), name: what it is called; command: how to run the pilot again; seconds: it took. Whether
    privacy.nothing_leaves watches over it is looked up now.
    """
    context = latency["context"] if latency else settings.context
    codes_made = codes.to_dict()
    keys, values = kv_bytes(model), codes_made["bytes_per_token"]
    judged = judgement.to_dict()
    return judged | {
        "format": FORMAT, "language": language, "title": title,
        "made": {
            "date": datetime.date.today().isoformat(), "version": version("hashattn"),
            "code": code_version(), "model": name,
            "model_sha256": model_sha256(model), "model_note": note, "machine": machine(),
            "settings": settings.to_dict(), "command": command, "seconds": seconds,
        },
        "preflight": preflight.to_dict(),
        "documents": {
            "scored": _documents(plan.scored, plan), "unused": [],
            "calibration": _documents(plan.calibration, plan),
            "skipped": [
                {"name": each.name, "reason": each.reason, "key": each.key,
                 "values": dict(each.values)}
                for each in library.skipped
            ],
        },
        "cut": cut_contexts(plan),
        "codes": codes_made,
        "latency": latency,
        "memory": {"kv_bytes_per_token": keys, "code_bytes_per_token": values, "context": context,
                   "kv_bytes": keys * context, "code_bytes": values * context},
        "changed": list(changed),
        "monitor": _monitor(judgement, codes),
        "use": _use(judgement, codes, tried, latency),
        "private": {"sockets_denied": is_guarded(), "offline": is_guarded()},
    }  # fmt: skip


def _use(
    judgement: Judgement, codes: PilotCodes, tried: Sequence[Method],
    latency: dict[str, Any] | None,
) -> str | None:  # fmt: skip
    """Code that reads as recommended, None where nothing is."""
    method = next((m for m in tried[1:] if m.budget.density == judgement.budget), None)
    if method is None:
        return None
    ours = codes.place.is_relative_to(repository())
    place = codes.place.relative_to(repository()).as_posix() if ours else codes.place.name
    fraction = f"1 / {1 / judgement.budget:g}"
    lines = [f'selector = HashSelector.as_trained(HashWeights.load("{place}", model))']
    if judgement.verdict == FALLBACK:
        lines += [
            "# the fallback reads ranked tokens, and more where an error is to be expected",
            f"budget = Budget(density={fraction})",
            "# captured: 60 texts of your traffic or more, each",
            "# list(hashattn.hashing.capture(model, ids, rows=rows, values=True).values())",
            "fallback = calibrate_fallback(captured, selector, budget, model=model, tolerance=0.1)",
        ]
        read = ["budget", "fallback=fallback"]
    else:
        drawn = f", sampled={method.budget.sampled:g}" if method.budget.sampled else ""
        read = [f"Budget(density={fraction}{drawn})"]
    comment, below = _dense_below(judgement, latency)
    lines += [*comment, f"with attach({', '.join(['model', 'selector', *read, *below])}) as run:"]
    return "\n".join([*lines, "    model.generate(**inputs)", "print(run.receipt.summary())"])


def _dense_below(
    judgement: Judgement, latency: dict[str, Any] | None
) -> tuple[list[str], list[str]]:
    """A comment and attach's argument for the length up to which a sparse step would lose: nothing
    where no times were measured; a fallback's steps were not."""
    if latency is None:
        return [], []
    at = next(each for each in latency["budgets"] if each["budget"] == judgement.budget)
    if judgement.verdict == FALLBACK or at["dense_below"] is None:
        return ["# the length from which this pays is measured here"], ['dense_below="break_even"']
    measured = f'# measured on {latency["device"]}: on another machine, "break_even" measures'
    return [measured], [f"dense_below={at['dense_below']}"]


def kv_bytes(model: Any) -> int:
    """Bytes of a token's keys and values, in the model's dtype, in layers that keep all tokens."""
    from hashattn.models.structure import attention_shapes

    shapes = attention_shapes(model)
    return (
        2 * len(shapes["layers"]) * shapes["kv_heads"] * shapes["head_dim"] * model.dtype.itemsize
    )


def _documents(documents: Sequence[tuple[Any, int]], plan: Plan) -> list[dict[str, Any]]:
    return [
        {"name": document.name, "kind": document.kind, "characters": len(document.text),
         "tokens": tokens, "cut": document.name in plan.divided}
        for document, tokens in documents
    ]  # fmt: skip


def _monitor(judgement: Judgement, codes: PilotCodes) -> list[dict[str, Any]]:
    """What to watch, once it runs; nothing where it should not run."""
    if judgement.verdict not in (GO, FALLBACK):
        return []
    watch = [{"key": "watch_receipt", "values": {"budget": judgement.budget}}]
    if judgement.verdict == FALLBACK:
        watch.append({"key": "watch_fallback", "values": {}})
    watch.append({"key": "watch_drift", "values": {}})
    if codes.mass is not None:
        watch.append({"key": "retrain_when", "values": {"mass": codes.mass}})
    return [*watch, {"key": "recheck_when", "values": {}}]
