"""LongBench v1's 21 datasets, LongBench-E's 13, and their records on disk or on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hashattn.base.checks import require_one_of
from hashattn.evaluation.records import Record, RecordError, load_records, record_from_dict


@dataclass(frozen=True)
class Dataset:
    """How LongBench asks and scores one dataset (THUDM/LongBench: pred.py, eval.py, config/).

    metric: a key of metrics.METRICS. max_new_tokens: of an answer. chat: whether chat models are
    asked through their template (few-shot prompts and code are continued as they are).
    first_line: only the prediction's first line is scored. end_tokens: texts whose token ends the
    answer as the model's own end token does, once there are min_new_tokens.
    """

    name: str
    category: str
    language: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False
    end_tokens: tuple[str, ...] = ()
    min_new_tokens: int = 0


def _table(*datasets: Dataset) -> dict[str, Dataset]:
    return {dataset.name: dataset for dataset in datasets}


SINGLE, MULTI, SUMMARY = "single-document QA", "multi-document QA", "summarization"
FEW_SHOT, SYNTHETIC, CODE = "few-shot learning", "synthetic", "code completion"
_SHOTS = {"chat": False, "first_line": True}

DATASETS = _table(
    Dataset("narrativeqa", SINGLE, "en", "qa_f1", 128),
    Dataset("qasper", SINGLE, "en", "qa_f1", 128),
    Dataset("multifieldqa_en", SINGLE, "en", "qa_f1", 64),
    Dataset("multifieldqa_zh", SINGLE, "zh", "qa_f1_zh", 64),
    Dataset("hotpotqa", MULTI, "en", "qa_f1", 32),
    Dataset("2wikimqa", MULTI, "en", "qa_f1", 32),
    Dataset("musique", MULTI, "en", "qa_f1", 32),
    Dataset("dureader", MULTI, "zh", "rouge_zh", 128),
    Dataset("gov_report", SUMMARY, "en", "rouge_l", 512),
    Dataset("qmsum", SUMMARY, "en", "rouge_l", 512),
    Dataset("multi_news", SUMMARY, "en", "rouge_l", 512),
    Dataset("vcsum", SUMMARY, "zh", "rouge_zh", 512),
    Dataset("trec", FEW_SHOT, "en", "classification", 64, **_SHOTS),
    Dataset("triviaqa", FEW_SHOT, "en", "qa_f1", 32, **_SHOTS),
    # a summary is one line; the minimum keeps a first line break from ending it empty
    Dataset("samsum", FEW_SHOT, "en", "rouge_l", 128, **_SHOTS, end_tokens=("\n",),
            min_new_tokens=1),
    Dataset("lsht", FEW_SHOT, "zh", "classification", 64, **_SHOTS),
    Dataset("passage_count", SYNTHETIC, "en", "count", 32),
    Dataset("passage_retrieval_en", SYNTHETIC, "en", "retrieval", 32),
    Dataset("passage_retrieval_zh", SYNTHETIC, "zh", "retrieval_zh", 32),
    Dataset("lcc", CODE, "code", "code_sim", 64, chat=False),
    Dataset("repobench-p", CODE, "code", "code_sim", 64, chat=False),
)  # fmt: skip

LONGBENCH_E = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec",
    "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
E_NAMES = tuple(f"{name}_e" for name in LONGBENCH_E)  # their files and hub configurations
BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}  # upper ends of `length`, exclusive


def dataset(name: str) -> Dataset:
    """The dataset of a name, "hotpotqa" or LongBench-E's "hotpotqa_e"; ValueError for others."""
    if name in E_NAMES:
        return DATASETS[name.removesuffix("_e")]
    require_one_of("dataset", name, [*DATASETS, *E_NAMES])
    return DATASETS[name]


def bucket(length: int) -> str:
    """LongBench-E's interval of a record's `length`: "0-4k", "4-8k" or "8k+"."""
    return next(name for name, end in BUCKETS.items() if length < end)


def load_dataset(
    source: str | Path, name: str, limit: int | None = None, revision: str | None = None
) -> list[Record]:
    """At most `limit` records of LongBench's dataset `name` ("hotpotqa", or "hotpotqa_e").

    source: a folder with the official <name>.jsonl, itself or in its subfolder data/ (as data.zip
    unpacks), else a hub id or local repository that `datasets` can read, at `revision`. Records
    carry `name` as their dataset, which tells LongBench-E's from the others. ValueError for an
    unknown name, RecordError for what is missing or not in LongBench's format.
    """
    dataset(name)
    path = find_file(source, name)
    if path is not None:
        records = load_records(path, limit)
    else:
        records = _from_hub(str(source), name, limit, revision)
    return [replace(record, dataset=name) for record in records]


def find_file(folder: str | Path, name: str) -> Path | None:
    """<folder>/<name>.jsonl or <folder>/data/<name>.jsonl, whichever exists."""
    paths = (Path(folder) / f"{name}.jsonl", Path(folder) / "data" / f"{name}.jsonl")
    return next((path for path in paths if path.is_file()), None)


def _from_hub(source: str, name: str, limit: int | None, revision: str | None) -> list[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(source, name, split="test", revision=revision)
    except Exception as error:  # they have no common class: scripts, network, names, files
        raise RecordError(
            f"{source} has no {name}.jsonl and `datasets` cannot load {name!r} from it: {error}\n"
            "  Unpack LongBench's data.zip (hf download THUDM/LongBench data.zip --repo-type "
            "dataset) and give its folder; or give a copy of LongBench in Parquet, or "
            'revision="refs/convert/parquet" where the repository still holds a loading script'
        ) from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    records = [_record(row, f"{source} {name}:{number}") for number, row in enumerate(rows, 1)]
    if not records and limit != 0:
        raise RecordError(f"{source} holds no records of {name}")
    return records


def _record(row: dict[str, Any], where: str) -> Record:
    try:
        return record_from_dict(row)
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error


TRAINED, SCORED = 25, 175  # samples of a dataset in the paper's fine-tuned 32x variant


@dataclass(frozen=True)
class Split:
    """Records that may train hashes and records that score, of each dataset.

    shared_contexts: scored records whose context trains too (LongBench asks several questions of
    some documents, so the paper's split is not clean by context).
    """

    train: tuple[Record, ...]
    score: tuple[Record, ...]

    @property
    def shared_contexts(self) -> tuple[Record, ...]:
        trained = {record.context for record in self.train}
        return tuple(record for record in self.score if record.context in trained)


def fine_tuning_split(
    records: Iterable[Record], trained: int = TRAINED, scored: int = SCORED
) -> Split:
    """The paper's split for its fine-tuned 32x variant: of each dataset, in file order, the last
    `trained` samples train and the first `scored` score.

    A dataset too small for both (MultiFieldQA-en, 150 samples) trains nothing. Give whole
    datasets: the last samples of a shortened one are others.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.dataset, []).append(record)
    train, score = [], []
    for group in groups.values():
        if len(group) >= trained + scored:
            train += group[len(group) - trained :]
        score += group[:scored]
    return Split(tuple(train), tuple(score))
