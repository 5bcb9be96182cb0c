"""Generated tasks made hard: five times as many facts, so that many lines share half of a
question's key, and a label that several lines decide (generated.py's "vote")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.benchmarks.generated import make_records, protocol
from hashattn.evaluation.records import Record, record_from_dict

TASKS = ("needle", "multihop", "vote")
_FACTS_PER_1K = 12.5


def records(
    profile: Any, tokenizer: Any, length: int, samples: int, folder: Path | None
) -> list[Record]:
    """`samples` records of each of the profile's tasks; every context is asked one question of
    each."""
    made = make_records(
        tokenizer, length, samples, seed=profile.seed, tasks=profile.tasks, questions_per_task=1,
        facts_per_1k=_FACTS_PER_1K,
    )  # fmt: skip
    return [record_from_dict(record) for record in made]


BENCHMARK = Benchmark(records, protocol, TASKS, drawn=True)
