"""LongBench's protocol by the book, and the one that HashAttention's authors used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hashattn.base.checks import is_text
from hashattn.base.files import read_json
from hashattn.base.repository import repository
from hashattn.evaluation.benchmarks.longbench import DATASETS, E_NAMES, Dataset, dataset
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import RecordError

OWN_PROMPTS = Path("data") / "longbench" / "prompts.json"
OFFICIAL_PROMPTS = "dataset2prompt.json"
AUTHORS_WINDOW = 128  # last prompt tokens that run sparse
AUTHORS_FIRST = 128  # first prompt tokens that truncation keeps


def load_prompts(folder: str | Path | None = None) -> dict[str, str]:
    """{dataset: template} of all 21, with {context} and, where there is a question, {input}.

    The official dataset2prompt.json where it comes with the data: in `folder`, in its config/, or
    in the config/ beside it (as in LongBench's repository). Else ours, data/longbench/prompts.json:
    other words, same placeholders. RecordError for a file that is broken or lacks a dataset.
    """
    path = find_prompts(folder) if folder is not None else None
    path = path or repository() / OWN_PROMPTS
    found = read_json(path, RecordError)
    if not isinstance(found, dict) or not all(is_text(t, empty=True) for t in found.values()):
        raise RecordError(f"{path} must hold a JSON object of templates; restore or remove it")
    missing = [name for name in DATASETS if "{context}" not in found.get(name, "")]
    if missing:
        raise RecordError(f"{path} has no template with {{context}} for {missing}; add them")
    return {name: found[name] for name in DATASETS}


def find_prompts(folder: str | Path) -> Path | None:
    """The dataset2prompt.json that comes with the data in `folder`, None without one."""
    folder = Path(folder)
    places = (folder, folder / "config", folder.parent / "config")
    files = (place / OFFICIAL_PROMPTS for place in places)
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
        datasets={name: _asked(dataset(name), prompts, chat) for name in (*DATASETS, *E_NAMES)},
        **changes,
    )  # fmt: skip


def authors(
    prompts: Mapping[str, str], max_length: int, *, chat: bool = True, **changes: Any
) -> Protocol:
    """The protocol of the paper's LongBench runs (xAlg-ai/LongBenchEval).

    As by_the_book, except: the limit counts prompt and answer, after the chat template; longer
    prompts keep their first 128 tokens and the end; the last 128 prompt tokens and the answer run
    sparse, everything before dense; an answer to SAMSum may be empty. max_length: 131072 for
    Llama-3.1, 32768 for Mistral-7B-v0.3. Their code gives Llama a second beginning-of-sequence
    token and tokenises a truncated prompt anew; here prompts begin once and keep their tokens.
    """
    least = AUTHORS_FIRST + 1 + max(of.max_new_tokens for of in DATASETS.values())
    if max_length < least:
        raise ValueError(
            f"max_length = {max_length} must be at least {least}: the first {AUTHORS_FIRST} "
            "tokens, one of the end and the longest answer"
        )
    settings = {}
    for name in (*DATASETS, *E_NAMES):
        asked = _asked(dataset(name), prompts, chat) | {"min_new_tokens": 0}
        if asked.pop("end_tokens"):
            asked["stop"] = "\n"
        settings[name] = asked | {"max_context": max_length - asked["max_new_tokens"]}
    return Protocol(
        stop=None, truncated="chat", truncation="suffix", keep_first=AUTHORS_FIRST,
        max_context=max_length, window=AUTHORS_WINDOW, datasets=settings, **changes,
    )  # fmt: skip


def _asked(of: Dataset, prompts: Mapping[str, str], chat: bool) -> dict[str, Any]:
    return {
        "template": prompts[of.name],
        "metric": of.metric,
        "max_new_tokens": of.max_new_tokens,
        "min_new_tokens": of.min_new_tokens,
        "end_tokens": of.end_tokens,
        "chat": of.chat and chat,
        "first_line": of.first_line,
    }
