"""The cells of an evaluation (one record, one method, one setup), and what answers them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hashattn.attention.attachment import Attachment, attach
from hashattn.attention.receipt import Receipt
from hashattn.base.engines.threads import thread_count
from hashattn.evaluation.answering import (
    PrefilledContext,
    ReadQuestion,
    end_tokens,
    feed,
    greedy,
)
from hashattn.evaluation.methods import Method, row_from_receipt
from hashattn.evaluation.prompting import Prompt, answer_tokens, end_token_ids
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record

TIMINGS = ("seconds", "question_seconds", "prefill_seconds")  # these differ between equal runs


@dataclass(frozen=True)
class Cell:
    """One record, answered by one method (its number) in one setup.

    key: of its result; protocol: that of the record's dataset (Protocol.of) in the setup; prompt:
    what is prefilled, what follows, and what was cut; labels: what the row says beside its result.
    """

    key: str
    method: int
    record: Record
    protocol: Protocol
    prompt: Prompt
    labels: dict[str, Any]

    @property
    def context(self) -> Sequence[int]:
        """Token ids of what is prefilled."""
        return self.prompt.context

    @property
    def question(self) -> Sequence[int]:
        """Token ids of what follows the context."""
        return self.prompt.question


class ContextRunner:
    """Answers cells of one context, one row each, in their order; picklable, for other processes.

    Of the TIMINGS, `seconds` is the answer's own; the others were shared (tables.sharing_table).

    The context is prefilled once for all of them. A question that is read dense (in setup A, and by
    dense attention in both) is read once for all cells that ask it. Selectors that observe are the
    exception: each cell has a prefill of its own.

    threads: how many threads decode after a context (evaluation.threads); by default torch's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        methods: Sequence[Method],
        threads: Callable[[PrefilledContext], int] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.methods = model, tokenizer, tuple(methods)
        self.threads = threads

    @property
    def device(self) -> torch.device:
        """Where the model is, and workers need to be."""
        return self.model.device

    @torch.no_grad()
    def __call__(self, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        """Rows of cells with equal `context`. Raises as attach and row_from_receipt do."""
        context = PrefilledContext(self.model, cells[0].context)
        self._threads(context)  # measured before any answer is timed
        cache = context.fork()
        for cell in cells:
            question = self._dense_question(cell, context)
            start = time.perf_counter()
            result, receipt = self._answer(cell, context, cache, question)
            seconds = (
                time.perf_counter() - start,
                question.seconds if question else 0.0,
                0.0 if self._observes(cell) else context.seconds,
            )
            row = self._row(cell, result, receipt)
            yield row | dict(zip(TIMINGS, seconds, strict=True))
            cache = context.rewind(cache)

    def _dense_question(self, cell: Cell, context: PrefilledContext) -> ReadQuestion | None:
        """The question read dense, for all cells that ask it so; None for one that reads it."""
        if self._observes(cell) or self._reads_sparse(cell):
            return None
        with thread_count(self._threads(context)):
            return context.read(cell.question, self._ends(cell)[1])

    def _answer(
        self, cell: Cell, context: PrefilledContext, cache: Any, question: ReadQuestion | None
    ) -> tuple[dict[str, Any], Receipt | None]:
        """What a row says of one cell's answer, and what was read for it."""
        method, first = self.methods[cell.method], None
        # an observing selector has to see the prefill, and decoding changes what it stores
        if self._observes(cell):
            with self._attached(cell, 1):
                cache = PrefilledContext(self.model, cell.context).cache
                first = None if self._reads_sparse(cell) else self._feed(cell, cache)
        elif question is not None:
            context.append(cache, question)
            first = question.first
        rows = len(cell.question) if self._reads_sparse(cell) else 1
        attached = self._attached(cell, rows) if method.sparse else nullcontext()
        with attached as run, thread_count(self._threads(context)):
            first = self._feed(cell, cache) if first is None else first
            prediction = self._greedy(cell, cache, first)
        record = cell.record
        score = cell.protocol.score(prediction, record.answers, record.all_classes)
        result = {"prediction": prediction, "answers": list(record.answers), "score": score}
        return result, run.receipt if method.sparse else None

    def _threads(self, context: PrefilledContext) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads(context)

    def _observes(self, cell: Cell) -> bool:
        method = self.methods[cell.method]
        return method.sparse and method.selector.observes

    def _reads_sparse(self, cell: Cell) -> bool:
        return self.methods[cell.method].sparse and cell.protocol.question == "sparse"

    def _ends(self, cell: Cell) -> tuple[frozenset[int], frozenset[int]]:
        """Token ids that end the answer, and those of them that may not begin it."""
        ends = end_tokens(self.model) | end_token_ids(self.tokenizer, cell.protocol)
        return ends, ends if cell.protocol.min_new_tokens else frozenset()

    def _feed(self, cell: Cell, cache: Any) -> int:
        return feed(self.model, cell.question, cache, self._ends(cell)[1])

    def _greedy(self, cell: Cell, cache: Any, first: int) -> str:
        protocol = cell.protocol
        longest = answer_tokens(self.tokenizer, protocol, cell.record)
        return greedy(self.model, self.tokenizer, cache, first, longest, protocol.stop,
                      self._ends(cell)[0], protocol.min_new_tokens)  # fmt: skip

    def _attached(self, cell: Cell, sparse_rows: int) -> Attachment:
        method = self.methods[cell.method]
        return attach(
            self.model, method.selector, method.budget,
            sparse_rows=sparse_rows,
            dense_layers=cell.protocol.dense_layers,
            allow_dense=True,  # methods.verify judges all samples: one context may be too short
            allow_untrained=method.allow_untrained,
        )  # fmt: skip

    def _row(self, cell: Cell, result: dict[str, Any], receipt: Receipt | None) -> dict[str, Any]:
        method, tokens = self.methods[cell.method], len(cell.context)
        return {
            "key": cell.key,
            **cell.labels,
            **result,
            "context_tokens": tokens,
            **(asdict(cell.prompt.cut) if cell.prompt.cut else {}),
        } | row_from_receipt(method, receipt, tokens)
