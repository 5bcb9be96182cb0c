"""Fidelity: how close sparse attention stays to dense on any text, without labels.

A record is a document. All of it but the last tokens (the protocol's `window`) is prefilled dense;
these are then read teacher-forced, dense and sparse, and the distributions of the next token are
compared at every position. Then both continue on their own, up to max_new_tokens. With
Protocol(metric="fidelity") `evaluate` scores so: `score` is the share of positions at which both
choose the same token, and a row has the fields of Fidelity beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hashattn.attention.receipt import Receipt
from hashattn.base.engines.threads import thread_count
from hashattn.evaluation.answering import PrefilledContext, ReadQuestion
from hashattn.evaluation.cells import Cell, ContextRunner
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record
from hashattn.evaluation.statistics import paired_bootstrap
from hashattn.evaluation.tables import POINTS, require_one_protocol

_ROWS = 256  # positions whose distributions are compared at once; bounds memory


@dataclass(frozen=True)
class Fidelity:
    """Sparse beside dense on one text.

    positions: tokens that were read; kl: mean KL(dense || sparse) of the next token's distribution,
    nats; agreement: share of positions with the same most likely token; nll, dense_nll: mean
    negative log-likelihood of the text's own next tokens, nats; their difference is the logarithm
    of the perplexity ratio. same_tokens: greedy tokens until the first that differs; new_tokens:
    those that were compared.
    """

    positions: int
    kl: float
    agreement: float
    nll: float
    dense_nll: float
    same_tokens: int
    new_tokens: int


def compare_logits(dense: Tensor, sparse: Tensor, targets: Tensor) -> dict[str, float]:
    """kl, agreement, nll and dense_nll of Fidelity.

    dense, sparse: logits (positions, vocabulary); targets: (positions,) int64, the token that
    follows each position; -1 where none is known, which counts for neither likelihood.
    """
    sums = dict.fromkeys(("kl", "agreement", "nll", "dense_nll"), 0.0)
    for part in range(0, len(dense), _ROWS):
        rows = slice(part, part + _ROWS)
        p, q = (x[rows].float().log_softmax(-1) for x in (dense, sparse))
        sums["kl"] += (p.exp() * (p - q)).sum(-1).clamp(min=0).sum().item()
        sums["agreement"] += (p.argmax(-1) == q.argmax(-1)).sum().item()
        known = targets[rows] >= 0
        at = targets[rows].clamp(min=0)[:, None]
        sums["nll"] -= q.gather(1, at)[known].sum().item()
        sums["dense_nll"] -= p.gather(1, at)[known].sum().item()
    likely = max(1, int((targets >= 0).sum()))
    counts = {"kl": len(dense), "agreement": len(dense), "nll": likely, "dense_nll": likely}
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


@dataclass(frozen=True)
class _Reading:
    """What a pass over a text gave: logits (positions, vocabulary), and greedy tokens after it."""

    logits: Tensor
    tokens: tuple[int, ...]


class FidelityRunner(ContextRunner):
    """Scores cells by fidelity: see the module.

    Sparse attention reads dense attention's greedy tokens as a draft, all in one call: up to the
    first token that it would not have chosen they are what it would have written by itself.
    """

    _dense: tuple[tuple, _Reading] | None = None  # of the last text: methods share it

    def _dense_question(self, cell: Cell, context: PrefilledContext) -> None:
        """None: what is compared are the logits of all positions, which _dense_reading keeps."""

    def _answer(
        self, cell: Cell, context: PrefilledContext, cache: Any, question: ReadQuestion | None
    ) -> tuple[dict[str, Any], Receipt | None]:
        method = self.methods[cell.method]
        dense = self._dense_reading(cell, context)
        if not method.sparse:
            return _result(cell, dense, dense), None
        if self._observes(cell):
            with self._attached(cell, 1):
                cache = PrefilledContext(self.model, cell.context).cache
        draft = dense.tokens[:-1]
        with thread_count(self._threads(context)):
            if self._reads_sparse(cell):
                with self._attached(cell, len(cell.question) + len(draft)) as run:
                    logits = self._logits([*cell.question, *draft], cache)
            else:
                logits = self._logits(cell.question, cache)
                with self._attached(cell, max(1, len(draft))) as run:
                    if draft:
                        logits = torch.cat([logits, self._logits(draft, cache)])
        positions = len(cell.question)
        tokens = logits[positions - 1 :].argmax(-1).tolist()[: len(dense.tokens)]
        return _result(cell, dense, _Reading(logits[:positions], tuple(tokens))), run.receipt

    def _dense_reading(self, cell: Cell, context: PrefilledContext) -> _Reading:
        """The text's last tokens in one call, then max_new_tokens greedy ones."""
        text = (tuple(cell.context), tuple(cell.question), cell.protocol.max_new_tokens)
        if self._dense is None or self._dense[0] != text:
            cache, tokens = context.fork(), []
            with thread_count(self._threads(context)):
                logits = last = self._logits(cell.question, cache)
                while len(tokens) < (cell.protocol.max_new_tokens or 0):
                    if tokens:
                        last = self._logits(tokens[-1:], cache)
                    tokens.append(int(last[-1].argmax()))
            self._dense = text, _Reading(logits, tuple(tokens))
        return self._dense[1]

    def _logits(self, tokens: Sequence[int], cache: Any) -> Tensor:
        """Logits (tokens, vocabulary) of one call, dense or sparse as the model is."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]


def _result(cell: Cell, dense: _Reading, sparse: _Reading) -> dict[str, Any]:
    targets = torch.tensor([*cell.question[1:], -1], device=dense.logits.device)
    compared = compare_logits(dense.logits, sparse.logits, targets)
    same = _same_tokens(dense.tokens, sparse.tokens)
    fidelity = Fidelity(len(cell.question), **compared, same_tokens=same,
                        new_tokens=len(dense.tokens))  # fmt: skip
    return {"prediction": "", "answers": [], "score": fidelity.agreement} | asdict(fidelity)


def _same_tokens(dense: Sequence[int], sparse: Sequence[int]) -> int:
    pairs = zip(dense, sparse, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(dense))


def fidelity_protocol(tokens: int = 128, new_tokens: int = 32, **changes: Any) -> Protocol:
    """The protocol that scores documents by fidelity over their last `tokens` tokens, then over
    `new_tokens` greedy ones. changes: other fields of Protocol, as sink, local, max_context."""
    fields = {"template": "{context}", "truncated": "prompt", "stop": None} | changes
    return Protocol(metric="fidelity", window=tokens, max_new_tokens=new_tokens, **fields)


def document(text: str, dataset: str = "", name: str = "") -> Record:
    """A document as a record, of which nothing is asked."""
    return Record("", text, ("",), length=len(text), dataset=dataset, _id=name)


def fidelity_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One line for each method and budget of evaluate()'s rows (of one setup and protocol), over
    all documents alike.

    kl (nats, with the ends of its 95 % bootstrap interval over documents), agreement (points),
    perplexity_ratio (sparse / dense), same_tokens (greedy tokens until the first difference, mean),
    density and documents. ValueError for rows of several setups or protocols.
    """
    require_one_protocol(frame)
    lines = {}
    for label, part in frame.groupby(["method", "budget"], sort=False):
        kl = paired_bootstrap(part["kl"], np.zeros(len(part)), groups=list(part["context"]))
        lines[label] = {
            "kl": kl.difference, "kl_low": kl.low, "kl_high": kl.high,
            "agreement": POINTS * part["agreement"].mean(),
            "perplexity_ratio": float(np.exp((part["nll"] - part["dense_nll"]).mean())),
            "same_tokens": part["same_tokens"].mean(),
            "density": part["density"].mean(), "documents": len(part),
        }  # fmt: skip
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis(["method", "budget"])
