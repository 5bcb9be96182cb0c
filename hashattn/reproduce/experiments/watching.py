"""Notebook 05: one answer audited, and traffic that changes under a drift monitor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor

from hashattn.attention.attachment import attach
from hashattn.attention.budget import Budget
from hashattn.attention.fallback import Fallback
from hashattn.attention.receipt import Receipt
from hashattn.evaluation.records import Record
from hashattn.reproduce.experiments import common
from hashattn.reproduce.notebooks.claims import Claims
from hashattn.reproduce.profiles import Profile
from hashattn.selectors.base import Selector
from hashattn.trust.audit.evidence import Evidence
from hashattn.trust.audit.listener import Audit
from hashattn.trust.audit.page import save_page
from hashattn.trust.audit.source import find_documents
from hashattn.trust.drift.calibration import DriftCalibrator
from hashattn.trust.drift.monitor import DriftMonitor
from hashattn.trust.drift.reference import DriftReference
from hashattn.trust.drift.study import drift_study, kind_sequences, read_sequences, run_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTEXT = "context.txt"  # the document that the prompt quotes
_LENGTH, _ROWS = 448, 64  # tokens of a request, and how many of them are decoded
_DELAY = 50  # tokens within which a shift shall be seen


@dataclass(frozen=True)
class AuditedAnswer:
    """One question of the profile's benchmark, answered sparse under an audit.

    page: what an auditor opens in a browser.
    """

    record: Record
    answer: str
    evidence: Evidence
    receipt: Receipt
    page: Path

    @property
    def right(self) -> bool:
        """Whether an expected answer is in what was answered."""
        return any(expected in self.answer for expected in self.record.answers)

    def passages(self, most: int = 5) -> pd.DataFrame:
        """Those with the most dense attention when the answer's first token was chosen: text, place
        in the document, and their read, dense and missed shares, mean over layers and heads."""
        found = pd.DataFrame(self.evidence.rows(tokens=self.evidence.tokens[:1]))
        heads = found[["layer", "head"]].drop_duplicates().shape[0]
        inside = found[(found["unit"] == "passage") & (found["source"] == _CONTEXT)]
        inside = inside.astype({"start": int, "end": int})
        sums = inside.groupby(["start", "end"])[["read", "dense", "missed"]].sum() / heads
        best = sums.nlargest(most, "dense")
        texts = [self.record.context[start:end].strip() for start, end in best.index]
        return best.assign(passage=texts).set_index("passage", append=True)

    def claim(self, claims: Claims) -> None:
        """That the audit shows where the answer came from."""
        _, _, passage = self.passages(1).index[0]
        shown = any(answer in passage for answer in self.record.answers)
        claims.goal("audit: the most attended passage holds the answer", float(shown), low=1)


def audited_answer(
    profile: Profile, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    selector: Selector, density: float, number: int, length: int, *,
    fallback: Fallback | None = None, keep: Sequence[tuple[int, int]] | None = None,
) -> AuditedAnswer:  # fmt: skip
    """Question `number` about a context of `length` tokens, its first answer token sparse too.

    keep: characters [start, end) of the context that every step reads. Evidence, page and CSV lie
    in <results>/audit, anew; in audit_fallback with a `fallback`, in audit_kept with `keep`.
    """
    record = common.records(profile, tokenizer, length, samples=2)[number]
    protocol = common.protocol(profile, length).of(record.dataset)
    prompt = protocol.template.format(context=record.context, input=record.input)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    name = "audit_fallback" if fallback else "audit" if keep is None else "audit_kept"
    folder = profile.results / name
    shutil.rmtree(folder, ignore_errors=True)
    documents = find_documents(prompt, {_CONTEXT: record.context})
    audit = Audit(tokenizer, prompt, documents=documents, file=folder / "answer.audit")
    budget = Budget(profile.sink, profile.local, density=density)
    with attach(model, selector, budget, fallback=fallback) as run:
        cache = model(inputs.input_ids[:, :-1], logits_to_keep=1).past_key_values
        first = documents[0].start
        spans = [(first + int(start), first + int(end)) for start, end in keep or ()]
        kept = run.keep(audit.source.tokens_of(spans)) if keep else nullcontext()
        with run.listen(audit), kept:
            ids = model.generate(
                **inputs, past_key_values=cache, streamer=audit, max_new_tokens=12,
                tokenizer=tokenizer, stop_strings="\n", do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
    answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]).strip()
    evidence = Evidence.load(folder / "answer.audit")
    evidence.save_csv(folder / "answer.csv", tokens=evidence.tokens[:1])
    page = save_page(evidence, folder / "answer.html", notes=run.receipt.summary())
    return AuditedAnswer(record, answer, evidence, run.receipt, page)


@dataclass(frozen=True)
class DriftScale:
    """How many sequences are calibrated on (the first `warmup` for scales), read as usual traffic
    and as each shift, and served to the monitor; streams of so many steps and seeds are drawn."""

    calibrated: int = 128
    warmup: int = 24
    usual: int = 48
    shifted: int = 10
    served: int = 6
    steps: int = 10_000
    seeds: int = 20

    @classmethod
    def of(cls, profile: Profile) -> DriftScale:
        """The default, or as little as shows anything where a profile trains on few sequences."""
        if profile.training.sequences >= 16:
            return cls()
        return cls(calibrated=13, warmup=4, usual=4, shifted=3, served=2, steps=500, seeds=2)


@dataclass(frozen=True)
class WatchedTraffic:
    """A monitor that was calibrated on one kind of text and then served another.

    shift: the step at which the other kind began. study: drift_study's table over streams drawn
    from held-out sequences.
    """

    reference: DriftReference
    monitor: DriftMonitor
    shift: int
    study: pd.DataFrame


def watched_traffic(
    profile: Profile, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    selector: Selector, density: float, base: str, shifts: Sequence[str],
    scale: DriftScale | None = None,
) -> WatchedTraffic:  # fmt: skip
    """Calibrate on the training split of `base` (a kind of evaluation.benchmarks.texts), serve the
    held-out one and then the last of `shifts` to a monitor, and study all of them.

    The reference is saved in <results>/drift.
    """
    scale = scale or DriftScale.of(profile)
    budget = Budget(profile.sink, profile.local, density=density)
    texts = partial(_texts, tokenizer)
    with attach(model, selector, budget, sparse_rows=_ROWS) as run:
        with run.listen(DriftCalibrator(run, warmup=scale.warmup)) as calibrator:
            for ids in texts(base, scale.calibrated, "train"):
                run_rows(run, ids, _ROWS)
        reference = calibrator.reference()
        reference.save(profile.results / "drift")
        with run.listen(DriftMonitor(run, reference)) as monitor:
            for ids in texts(base, scale.served):
                run_rows(run, ids, _ROWS)
            shift = monitor.report().steps
            for ids in texts(shifts[-1], scale.served):
                run_rows(run, ids, _ROWS)
        read = partial(read_sequences, run, reference, rows=_ROWS)
        usual = read(texts(base, scale.usual))
        shifted = {kind: read(texts(kind, scale.shifted)) for kind in shifts}
    study = drift_study(reference, usual, shifted, steps=scale.steps, seeds=scale.seeds)
    return WatchedTraffic(reference, monitor, shift, study_table(study, base))


def study_table(rows: list[dict], base: str) -> pd.DataFrame:
    """drift_study's rows by base and stream, "usual" named after the base."""
    table = pd.DataFrame(rows)
    table["stream"] = table["stream"].replace("usual", base)
    table.insert(0, "base", base)
    return table.set_index(["base", "stream"])


def drift_claims(claims: Claims, study: pd.DataFrame, model: str) -> None:
    """Of each base: false alarms, and how soon each shift is seen."""
    for (base, kind), row in study.iterrows():
        if base == kind:
            share = row["alarms"] / row["streams"]
            claims.goal(f"{model}, {base}: streams with a false alarm (share)", share, high=0.02)
        else:
            late = row["delay"] if np.isfinite(row["delay"]) else 1e6
            claims.goal(f"{model}, {base} to {kind}: tokens until the alarm", late, high=_DELAY)


def _texts(tokenizer: PreTrainedTokenizerBase, kind: str, count: int, split: str = "eval"
           ) -> list[Tensor]:  # fmt: skip
    return kind_sequences(tokenizer, kind, _LENGTH, count, split)
