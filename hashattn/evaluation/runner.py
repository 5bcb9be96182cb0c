"""evaluate: score methods on LongBench-format records, one dense prefill a context, resumable."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hashattn.attention.sparse import Attachment, attach
from hashattn.evaluation.answering import PrefilledContext, end_tokens, feed, greedy
from hashattn.evaluation.identity import (
    code_version,
    context_sha256,
    model_sha256,
    record_sha256,
    tokenizer_sha256,
)
from hashattn.evaluation.log import ResultLog
from hashattn.evaluation.longbench import Record, group_by_context, record_from_dict
from hashattn.evaluation.methods import Method, check_methods, reading, save_reading, verify
from hashattn.evaluation.prompting import encode_prompt, end_token_ids
from hashattn.evaluation.protocol import Protocol, fingerprint
from hashattn.evaluation.tables import results_frame
from hashattn.progress import progress_bar, say
from hashattn.trust.receipt import Receipt

EXTRA_TOKENS = 2  # beyond the longest answer: the stop string and one that shows it went on


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Iterable[Record | dict[str, Any]],
    methods: Sequence[Method],
    protocol: Protocol,
    out_path: str | Path,
    progress: bool = True,
) -> pd.DataFrame:
    """One line for each record and method, in the order of the arguments.

    Records with the same context share one dense prefill. Every result is appended to out_path
    (.jsonl) as soon as it is known and found there again by its content: code, model, tokenizer,
    method, protocol, sample. A killed run repeats at most one sample. Receipts are summed up per
    method in <out_path>.receipts.json. The frame's attrs["reused"] counts lines already there.

    Raises ValueError for methods that do not fit the protocol or share name and budget,
    SparsePathError when a sparse method never skipped a token (unless it may), ResultLogError for a
    damaged file, and what attach raises.
    """
    cells = _Cells(model, tokenizer, records, methods, protocol)
    with ResultLog(out_path) as log, torch.no_grad():
        todo = sum(key not in log.rows for key in cells.keys.values())
        reused = len(cells.keys) - todo
        if reused and progress:
            say(f"reused {reused} of {len(cells.keys)} evaluated samples")
        with progress_bar(total=todo, desc="samples", unit="sample", disable=not progress) as bar:
            for row in cells.run(log):
                log.append(row)
                bar.update()
        rows = [cells.row(cell, log) for cell in cells.keys]
    frame = results_frame(rows)
    save_reading(f"{out_path}.receipts.json", rows)
    for method in cells.methods:
        verify(method, [cells.row(cell, log) for cell in cells.keys if cell[0] is method])
    frame.attrs["reused"] = reused
    return frame


class _Cells:
    """The grid of methods and records, each cell with the key of its result."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        records: Iterable[Record | dict[str, Any]],
        methods: Sequence[Method],
        protocol: Protocol,
    ) -> None:
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self.methods = list(methods)
        check_methods(self.methods, protocol)
        self.records = [r if isinstance(r, Record) else record_from_dict(r) for r in records]
        self._encoded: dict[int, tuple[list[int], list[int]]] = {}
        self.samples = [record_sha256(record) for record in self.records]
        common = {
            "code": code_version(),
            "model": model_sha256(model),
            "tokenizer": tokenizer_sha256(tokenizer),
            "device": model.device.type,
            "protocol": protocol.fingerprint,
        }
        self.keys = {
            (method, index): fingerprint(common | {"method": record, "sample": sample})
            for method, record in ((method, method.record()) for method in self.methods)
            for index, sample in enumerate(self.samples)
        }

    def run(self, log: ResultLog) -> Iterator[dict[str, Any]]:
        """The rows that the log lacks; a context is prefilled only if one of its cells is."""
        index = {id(record): i for i, record in enumerate(self.records)}
        for group in group_by_context(self.records):
            members = [index[id(record)] for record in group]
            cells = [(method, i) for method in self.methods for i in members]
            todo = [cell for cell in cells if self.keys[cell] not in log.rows]
            prefills: dict[tuple[int, ...], list[tuple[Method, int]]] = {}
            for cell in todo:  # whole prompts that were truncated may begin differently
                prefills.setdefault(tuple(self._tokens(cell[1])[0]), []).append(cell)
            for part in prefills.values():
                yield from self._run_context(part, log)
            self._encoded.clear()

    def _run_context(
        self, todo: list[tuple[Method, int]], log: ResultLog
    ) -> Iterator[dict[str, Any]]:
        shared, _ = self._tokens(todo[0][1])
        context = PrefilledContext(self.model, shared)
        cache = context.fork()
        for method, index in todo:
            if self.keys[method, index] in log.rows:  # the same record twice
                continue
            start = time.perf_counter()
            prediction, receipt = self._answer(method, index, cache)
            seconds = time.perf_counter() - start
            row = self._scored(method, index, len(shared), prediction, receipt)
            yield row | {"seconds": seconds}
            cache = context.rewind(cache)

    def _answer(self, method: Method, index: int, cache: Any) -> tuple[str, Receipt | None]:
        context, question = self._tokens(index)
        model, tokenizer, record = self.model, self.tokenizer, self.records[index]
        asked = self.protocol.of(record.dataset)
        ends = end_tokens(model) | end_token_ids(tokenizer, asked)
        barred = ends if asked.min_new_tokens else frozenset()
        rest = (self._max_new_tokens(record), asked.stop, ends, asked.min_new_tokens)
        if not method.sparse:
            first = feed(model, question, cache, barred)
            return greedy(model, tokenizer, cache, first, *rest), None
        sparse_question = self.protocol.question == "sparse"
        token = None
        # a selector that observes has to see its own prefill: the shared one came before it, and
        # decoding changes what it remembers
        observes = method.selector.observes
        with self._attached(method, 1) if observes else nullcontext():
            cache = PrefilledContext(model, context).cache if observes else cache
            if not sparse_question:
                token = feed(model, question, cache, barred)
        with self._attached(method, len(question) if sparse_question else 1) as run:
            first = feed(model, question, cache, barred) if token is None else token
            return greedy(model, tokenizer, cache, first, *rest), run.receipt

    def _attached(self, method: Method, sparse_rows: int) -> Attachment:
        return attach(
            self.model, method.selector, method.budget,
            sparse_rows=sparse_rows,
            dense_layers=self.protocol.dense_layers,
            allow_dense=True,  # judged over all samples, a single context may be short
            allow_untrained=method.allow_untrained,
        )  # fmt: skip

    def _tokens(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids of a record's context and of the question after it."""
        if index not in self._encoded:  # every method asks for them
            record = self.records[index]
            asked = self.protocol.of(record.dataset)
            self._encoded[index] = encode_prompt(self.tokenizer, asked, record)
        return self._encoded[index]

    def _max_new_tokens(self, record: Record) -> int:
        asked = self.protocol.of(record.dataset)
        if asked.max_new_tokens is not None:
            return asked.max_new_tokens
        encoded = self.tokenizer(list(record.answers), add_special_tokens=False)["input_ids"]
        return max(len(ids) for ids in encoded) + EXTRA_TOKENS

    def _scored(
        self,
        method: Method,
        index: int,
        context_tokens: int,
        prediction: str,
        receipt: Receipt | None,
    ) -> dict[str, Any]:
        record = self.records[index]
        asked = self.protocol.of(record.dataset)
        score = asked.score(prediction, record.answers, record.all_classes)
        return {
            "key": self.keys[method, index],
            "method": method.name,
            "budget": method.budget_label,
            "dataset": record.dataset,
            "sample": self.samples[index],
            "context": context_sha256(record),
            "protocol": self.protocol.fingerprint,
            "prediction": prediction,
            "answers": list(record.answers),
            "score": score,
            "context_tokens": context_tokens,
        } | reading(method, receipt, context_tokens)

    def row(self, cell: tuple[Method, int], log: ResultLog) -> dict[str, Any]:
        """A finished cell's row, under this run's name for its method and length of its record."""
        method, index = cell
        labels = {"method": method.name, "budget": method.budget_label}
        return log.rows[self.keys[cell]] | labels | {"length": self.records[index].length}
