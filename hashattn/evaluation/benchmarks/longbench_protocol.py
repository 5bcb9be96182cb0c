"""LongBench's protocol by the book, and its records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hashattn.base.checks import is_text
from hashattn.base.files import read_json
from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.benchmarks.longbench import (
    DATASETS,
    E_NAMES,
    Dataset,
    dataset,
    load_dataset,
)
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record, RecordError

_OWN_PROMPTS = Path("data") / "longbench" / "prompts.json"
_OFFICIAL_PROMPTS = "dataset2prompt.json"


def load_prompts(folder: str | Path | None = None) -> dict[str, str]:
    """{dataset: template} of all 21, with {context} and, where there is a question, {input}.

    The official dataset2prompt.json where it comes with the data (_find_prompts). Else ours,
    data/longbench/prompts.json: other words, same placeholders. RecordError for a file that is
    broken or lacks a dataset.
    """
    path = _find_prompts(folder) if folder is not None else None
    path = path or repository() / _OWN_PROMPTS
    prompts = read_json(path, RecordError)
    if not isinstance(prompts, dict) or not all(is_text(t, empty=True) for t in prompts.values()):
        raise RecordError(f"{path} must hold a JSON object of templates; restore or remove it")
    missing = [name for name in DATASETS if "{context}" not in prompts.get(name, "")]
    if missing:
        raise RecordError(f"{path} has no template with {{context}} for {missing}; add them")
    return {name: prompts[name] for name in DATASETS}


def _find_prompts(folder: str | Path) -> Path | None:
    """The dataset2prompt.json in `folder`, in its config/, or in the config/ beside it (as in
    LongBench's repository); None without one."""
    folder = Path(folder)
    folders = (folder, folder / "config", folder.parent / "config")
    files = (path / _OFFICIAL_PROMPTS for path in folders)
    return next((path for path in files if path.is_file()), None)


def by_the_book(
    prompts: Mapping[str, str], max_length: int | None = None, *, chat: bool = True, **changes: Any
) -> Protocol:
    """LongBench's own protocol (its pred.py and eval.py) for all 21 datasets and LongBench-E.

    prompts: load_prompts(). max_length: longest prompt in tokens before the chat template; longer
    ones lose their middle (LongBench: 3500, 7500, 15500 and 31500 for models of 4K to 32K).
    chat: False for a base model, else those datasets go through the chat template that LongBench
    names. changes: further fields of Protocol; by default the context is prefilled dense, the
    question and the answer run sparse.
    """
    return Protocol(
        stop=None, truncated="prompt", truncation="middle", max_context=max_length,
        datasets={n: dataset_fields(dataset(n), prompts, chat) for n in (*DATASETS, *E_NAMES)},
        **changes,
    )  # fmt: skip


def dataset_fields(spec: Dataset, prompts: Mapping[str, str], chat: bool) -> dict[str, Any]:
    """Fields of Protocol with which a dataset is asked and scored."""
    return {
        "template": prompts[spec.name],
        "metric": spec.metric,
        "max_new_tokens": spec.max_new_tokens,
        "min_new_tokens": spec.min_new_tokens,
        "end_tokens": spec.end_tokens,
        "chat": spec.chat and chat,
        "first_line": spec.first_line,
    }


def records(
    profile: Any, tokenizer: Any, length: int, samples: int, folder: Path | None
) -> list[Record]:
    """The first `samples` records of every dataset that the profile names."""
    return [r for task in profile.tasks for r in load_dataset(folder, task, samples)]


def protocol(profile: Any, length: int, folder: Path | None) -> Protocol:
    """by_the_book, limited to the profile's prompt_limit, else to `length` tokens."""
    return by_the_book(load_prompts(folder), profile.prompt_limit or length, chat=profile.chat,
                       sink=profile.sink, local=profile.local, seed=profile.seed)  # fmt: skip


BENCHMARK = Benchmark(records, protocol, (*DATASETS, *E_NAMES), reads_files=True, limited=True)
