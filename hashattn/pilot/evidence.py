"""Questions whose answers changed, with the page that shows what was read for the sparse one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hashattn.attention.attachment import attach
from hashattn.evaluation.answering import PrefilledContext, feed, greedy
from hashattn.evaluation.methods import Method
from hashattn.evaluation.metrics import first_line
from hashattn.evaluation.prompting import Prompt, make_prompt
from hashattn.evaluation.protocol import Protocol
from hashattn.models.identity import code_version, fingerprint, model_sha256
from hashattn.pilot.measurements import Measured
from hashattn.pilot.plan import Asked, Plan, protocol
from hashattn.pilot.settings import PilotSettings
from hashattn.trust.audit.listener import Audit
from hashattn.trust.audit.page import save_page
from hashattn.trust.audit.source import AuditError

_FOLDER = "audit"


def changed_answers(
    model: Any, tokenizer: Any, plan: Plan, measured: Measured, method: Method,
    settings: PilotSettings, folder: str | Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """What the report says of every answer at a method's budget that is not dense attention's:
    right answers that were lost first, then those that were won, then other words.

    The first `settings.audits` of them are answered once more under audit; `audit` is the page's
    path in `folder`, None for the others and where a prompt cannot be audited. A page that is there
    of this answer is kept, those of others go.
    """
    if not measured.compared:
        _forget(Path(folder), set())
        return []
    budget = method.budget.density
    dense, sparse = (measured.rows(measured.answers, d) for d in (None, budget))
    changed = []
    for asked, one, other in zip(measured.compared, dense.itertuples(), sparse.itertuples(),
                                 strict=True):  # fmt: skip
        if one.prediction.strip() != other.prediction.strip():
            right = (bool(one.score), bool(other.score)) if asked.answers else (None, None)
            changed.append((asked, one.prediction, other.prediction, right))
    changed.sort(key=lambda each: _weight(each[3]))
    protocols = protocol(tokenizer, settings, plan.answer_tokens)
    rows = []
    for number, (asked, before, after, right) in enumerate(changed):
        page = None
        if number < settings.audits:
            page = _audited(model, tokenizer, asked, method, protocols, Path(folder))
        rows.append({
            "question": asked.question, "document": asked.document,
            "expected": list(asked.answers), "dense": first_line(before).strip(),
            "sparse": first_line(after).strip(), "dense_right": right[0], "sparse_right": right[1],
            "budget": budget, "audit": page,
        })  # fmt: skip
    _forget(Path(folder), {row["audit"] for row in rows})
    return rows


def _forget(folder: Path, kept: set[str | None]) -> None:
    """Remove pages of answers that an earlier pilot in this folder changed."""
    for page in (folder / _FOLDER).glob("*.html"):
        if page.relative_to(folder).as_posix() not in kept:
            page.unlink()


def _weight(right: tuple[bool | None, bool | None]) -> int:
    return [(True, False), (False, True)].index(right) if right[0] != right[1] else 2


def _audited(
    model: Any, tokenizer: Any, asked: Asked, method: Method, protocols: Protocol, folder: Path
) -> str | None:
    own = protocols.of(asked.record.dataset)
    prompt = make_prompt(tokenizer, own, asked.record)
    known = [model_sha256(model), code_version(), own.fingerprint, method.record()]
    key = fingerprint([*known, prompt.context, prompt.question])[:12]
    name = f"{_FOLDER}/{key}.html"
    if (folder / name).is_file():
        return name
    ids = [*prompt.context, *prompt.question]
    text = tokenizer.decode(ids)
    start = text.find(asked.context.text)
    places = asked.context.places(start) if start >= 0 else []
    try:
        audit = Audit(tokenizer, text, ids=ids, documents=places)
    except AuditError:
        return None
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    receipt = _answer(model, tokenizer, prompt, method, audit, own)
    save_page(audit.evidence, folder / name, title=asked.question, notes=receipt)
    return name


@torch.no_grad()
def _answer(
    model: Any, tokenizer: Any, prompt: Prompt, method: Method, audit: Audit, own: Protocol
) -> str:
    """Answers as evaluation does, the audit listening; the receipt's summary."""
    rows = len(prompt.question)
    attached = attach(model, method.selector, method.budget, sparse_rows=rows, allow_dense=True)
    with attached as run, run.listen(audit):
        cache = PrefilledContext(model, prompt.context).cache
        audit.put(torch.tensor([[*prompt.context, *prompt.question]]))
        first = feed(model, prompt.question, cache)
        greedy(model, tokenizer, cache, first, own.max_new_tokens, own.stop,
               saw=lambda token: audit.put(torch.tensor([token])))  # fmt: skip
    return run.receipt.summary()
