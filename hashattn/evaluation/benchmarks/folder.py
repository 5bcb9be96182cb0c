"""Your own records: a folder with a LongBench-format <task>.jsonl for each of a profile's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.benchmarks.longbench import find_file
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record, RecordError, load_records


def records(
    profile: Any, tokenizer: Any, length: int, samples: int, folder: Path | None
) -> list[Record]:
    """The first `samples` records of every task's file; RecordError where one is missing."""
    loaded: list[Record] = []
    for task in profile.tasks:
        path = find_file(folder, task)
        if path is None:
            raise RecordError(f"{folder} has no {task}.jsonl; add it, or correct `tasks`")
        loaded += load_records(path, samples)
    return loaded


def protocol(profile: Any, length: int, folder: Path | None) -> Protocol:
    """Context dense, question and answer sparse; contexts are cut in the middle to `length`."""
    return Protocol(
        sink=profile.sink, local=profile.local, seed=profile.seed, template=profile.template,
        metric=profile.metric, max_context=length, truncation="middle",
    )  # fmt: skip


BENCHMARK = Benchmark(records, protocol, reads_files=True)
