"""evaluate: methods scored on LongBench-format records, one dense prefill a context, resumable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from hashattn.base.engines import RETRY, Engine, InProcess, chosen_engine
from hashattn.base.engines.lockstep import Lockstep, leads
from hashattn.base.engines.processes import spread
from hashattn.base.progress import progress_bar, say
from hashattn.evaluation.cells import Cell, ContextRunner
from hashattn.evaluation.identity import context_sha256, record_sha256
from hashattn.evaluation.log import ResultLog
from hashattn.evaluation.methods import Method, check_methods, save_receipts, verify
from hashattn.evaluation.prompting import Prompt, make_prompt, require_positions
from hashattn.evaluation.protocol import FIDELITY, SETUPS, Protocol
from hashattn.evaluation.records import Record, group_by_context, record_from_dict
from hashattn.evaluation.tables import results_frame
from hashattn.evaluation.threads import decode_threads
from hashattn.models.identity import (
    code_version,
    fingerprint,
    model_sha256,
    tokenizer_sha256,
)
from hashattn.models.structure import shared_by

# answers times parameters: fewer are given before processes have started
_WORTH_PROCESSES = 2 * 10**9
Place = tuple[int, int, str]  # a cell of the grid: method, record, setup


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Iterable[Record | dict[str, Any]],
    methods: Sequence[Method],
    protocol: Protocol,
    out_path: str | Path,
    progress: bool = True,
    *,
    setups: Sequence[str] = tuple(SETUPS),
    engine: Engine | None = None,
) -> pd.DataFrame:
    """One line for each setup, method and record, in the order of the arguments.

    Both setups run: "A", whole prompt dense and decoding sparse, and "B", the question sparse as
    well; the protocol's `question` does not matter. Tables take one: frame[frame.setup == "B"].

    A context is prefilled once, for all its questions, methods, budgets and setups; dense attention
    answers once, for both setups. Every result is appended to out_path (.jsonl) as soon as it is
    known, under a key of code, model, tokenizer, device, method, protocol and sample; a run reuses
    the results it finds, so a killed one repeats at most the samples in hand. Processes that write
    to the same file share the work by contexts; those that share a model (tensor parallelism) all
    call this and compute together. engine: by default the environment's choice (base.engines);
    where that is this process alone, on a CPU, with much to answer, a process for each of its
    cores. In one process, the faster number of threads decodes (evaluation.threads). Receipts are
    summarised per setup, method and budget in <out_path>.receipts.json. The frame's attrs["reused"]
    counts the results that were already there.

    A row whose prompt the protocol's limit cut has the fields of prompting.Cut; of the others
    cut_tokens is 0. The tables report cuts (tables.cut_note).

    Raises ValueError for methods that do not fit the protocol or share name and budget,
    PromptTooLongError for a prompt beyond the model's positions before anything runs,
    SparsePathError when a sparse method never skipped a token (unless it may), ResultLogError for a
    damaged file, EngineError, and what attach raises.
    """
    grid = _Grid(model, tokenizer, records, methods, protocol, setups)
    with ResultLog(out_path) as log:
        reused = sum(key in log.rows for key in grid.keys.values())
        total, before = len(set(grid.keys.values()) - log.rows.keys()), len(log.rows)
        grid.require_positions(model.config, log)
        if reused and progress:
            say(f"reused {reused} of {len(grid.keys)} answers")
        engine = engine or _engine(model, grid.missing_contexts(log), total)
        with progress_bar(total=total, desc="answers", unit="answer", disable=not progress) as bar:
            in_process = isinstance(engine, InProcess)
            threads = partial(decode_threads, progress=progress) if in_process else None
            runner = _runner(protocol)(model, tokenizer, grid.methods, threads)
            for row in engine.run(runner, grid.jobs(log)):
                log.append(row)
                bar.update(len(log.rows) - before - bar.n)  # rows of other processes count too
        log.refresh()
        rows = [grid.row(place, log) for place in grid.keys]
    if leads():
        save_receipts(f"{out_path}.receipts.json", rows)
    for number, method in enumerate(grid.methods):
        verify(method, [row for place, row in zip(grid.keys, rows, strict=True)
                        if place[0] == number])  # fmt: skip
    frame = results_frame(rows)
    frame.attrs["reused"] = reused
    return frame


def _engine(model: Any, contexts: int, answers: int) -> Engine:
    """What computes so many missing answers over so many contexts."""
    if shared_by(model) > 1:
        return Lockstep()
    sizes = [(each.numel(), each.element_size()) for each in model.parameters()]
    if answers * sum(count for count, _ in sizes) < _WORTH_PROCESSES:
        return chosen_engine()
    model_bytes = sum(count * size for count, size in sizes)
    return spread(contexts, 3 * model_bytes, model.device)  # its pickle and cached keys beside it


def _runner(protocol: Protocol) -> type[ContextRunner]:
    """What answers, by the protocol's metric."""
    if protocol.metric != FIDELITY:
        return ContextRunner
    from hashattn.evaluation.fidelity import FidelityRunner

    return FidelityRunner


def _by_selector(methods: Sequence[Method]) -> list[int]:
    """Numbers of methods, those of one selector in turn: what it encoded of a context serves all of
    them."""
    first: dict[int, int] = {}
    for number, method in enumerate(methods):
        first.setdefault(id(method.selector), number)
    return sorted(range(len(methods)), key=lambda number: first[id(methods[number].selector)])


class _Grid:
    """Setups by methods by records, each cell with the key of its result."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        records: Iterable[Record | dict[str, Any]],
        methods: Sequence[Method],
        protocol: Protocol,
        setups: Sequence[str],
    ) -> None:
        self.tokenizer, self.methods = tokenizer, list(methods)
        check_methods(self.methods, protocol)
        self._turns = _by_selector(self.methods)
        self.records = [r if isinstance(r, Record) else record_from_dict(r) for r in records]
        self.samples = [record_sha256(record) for record in self.records]
        self.contexts = [context_sha256(record) for record in self.records]
        self.setups = list(dict.fromkeys(setups))
        datasets = dict.fromkeys(record.dataset for record in self.records)
        self.protocols = {
            (setup, dataset): protocol.in_setup(setup).of(dataset)
            for setup in self.setups
            for dataset in datasets
        }
        self._protocol_labels = {
            key: {"protocol": own.fingerprint, "protocol_fields": own.to_dict()}
            for key, own in self.protocols.items()
        }
        common = {
            "code": code_version(),
            "model": model_sha256(model),
            "tokenizer": tokenizer_sha256(tokenizer),
            "device": model.device.type,
        }
        # dense attention answers alike in both setups: its results are keyed by setup A
        of_dense = {name: protocol.in_setup("A").of(name).fingerprint for name in datasets}
        settings = [common | {"method": method.record()} for method in self.methods]
        self.keys: dict[Place, str] = {
            (number, index, setup): fingerprint(
                settings[number]
                | {
                    "protocol": self._protocol_labels[setup, record.dataset]["protocol"]
                    if method.sparse
                    else of_dense[record.dataset],
                    "sample": self.samples[index],
                }
            )
            for setup in self.setups
            for number, method in enumerate(self.methods)
            for index, record in enumerate(self.records)
        }

    def jobs(self, log: ResultLog) -> Iterator[list[Cell] | None]:
        """Cells that the log lacks, those of one context together; contexts that another process
        works on come last, with what it left undone."""
        index_of = {id(record): i for i, record in enumerate(self.records)}
        groups = [[index_of[id(r)] for r in group] for group in group_by_context(self.records)]
        while groups:
            claimed_elsewhere = []
            for group in groups:
                if not self._missing(group, log):
                    continue
                if not log.claim(self.contexts[group[0]]):
                    claimed_elsewhere.append(group)
                    continue
                log.refresh()  # another process may have finished it before the claim
                yield from self._by_prompt(self._missing(group, log))
            if claimed_elsewhere:
                log.refresh()
                yield RETRY
            groups = claimed_elsewhere

    def missing_contexts(self, log: ResultLog) -> int:
        """How many contexts have cells that the log lacks."""
        return len(
            {self.contexts[place[1]] for place in self.keys if self.keys[place] not in log.rows}
        )

    def require_positions(self, config: Any, log: ResultLog) -> None:
        """PromptTooLongError for a missing record whose prompt and answer exceed the model's
        positions."""
        missing = dict.fromkeys(place[1] for place in self.keys if self.keys[place] not in log.rows)
        for record in (self.records[index] for index in missing):
            protocol = self.protocols[self.setups[0], record.dataset]
            require_positions(config, self.tokenizer, protocol, record)

    def _missing(self, group: Sequence[int], log: ResultLog) -> list[Place]:
        """A group's places without a result, one for each key, a selector's methods together."""
        places = [
            (number, index, setup)
            for number in self._turns
            for setup in self.setups
            for index in group
        ]
        missing = {self.keys[p]: p for p in reversed(places) if self.keys[p] not in log.rows}
        return list(reversed(missing.values()))

    def _by_prompt(self, places: Sequence[Place]) -> Iterator[list[Cell]]:
        """Cells by context ids, which whole prompts of one context may not share once truncated."""
        prompts: dict[int, Prompt] = {}
        jobs: dict[tuple[int, ...], list[Cell]] = {}
        for place in places:
            number, index, setup = place
            record = self.records[index]
            protocol = self.protocols[setup, record.dataset]
            if index not in prompts:  # the same for all methods and in both setups
                prompts[index] = make_prompt(self.tokenizer, protocol, record)
            cell = Cell(self.keys[place], number, record, protocol, prompts[index],
                        self.labels(place))  # fmt: skip
            jobs.setdefault(tuple(cell.context), []).append(cell)
        yield from jobs.values()

    def labels(self, place: Place) -> dict[str, Any]:
        """What a cell's row says of method, record and protocol, under this run's names."""
        number, index, setup = place
        method, record = self.methods[number], self.records[index]
        return {
            "setup": setup,
            "method": method.name,
            "budget": method.budget_label,
            "dataset": record.dataset,
            "length": record.length,
            "sample": self.samples[index],
            "context": self.contexts[index],
        } | self._protocol_labels[setup, record.dataset]

    def row(self, place: Place, log: ResultLog) -> dict[str, Any]:
        """A finished cell's row, under this run's labels."""
        return log.rows[self.keys[place]] | self.labels(place)
