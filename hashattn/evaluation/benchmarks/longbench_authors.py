"""LongBench as the authors of HashAttention ran it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hashattn.base.checks import require
from hashattn.evaluation.benchmarks.base import Benchmark
from hashattn.evaluation.benchmarks.longbench import DATASETS, E_NAMES, dataset
from hashattn.evaluation.benchmarks.longbench_protocol import dataset_fields, load_prompts, records
from hashattn.evaluation.protocol import Protocol

_AUTHORS_WINDOW = 128  # last prompt tokens that run sparse
_AUTHORS_FIRST = 128  # first prompt tokens that truncation keeps


def authors(
    prompts: Mapping[str, str], max_length: int, *, chat: bool = True, **changes: Any
) -> Protocol:
    """The protocol of the paper's LongBench runs (xAlg-ai/LongBenchEval).

    As by_the_book, except: the limit counts prompt and answer, after the chat template; longer
    prompts keep their first 128 tokens and the end; the last 128 prompt tokens and the answer run
    sparse, everything before dense; an answer to SAMSum may be empty. max_length: 131072 for
    Llama-3.1, 32768 for Mistral-7B-v0.3. Their code gives Llama a second beginning-of-sequence
    token and tokenises a truncated prompt anew; here prompts have one and keep their tokens.
    ValueError for a max_length with no room for the longest answer and the tokens kept beside it.
    """
    least = _AUTHORS_FIRST + 1 + max(spec.max_new_tokens for spec in DATASETS.values())
    require(
        max_length >= least, "max_length", max_length,
        f"at least {least}: the first {_AUTHORS_FIRST} tokens, one more and the longest answer",
    )  # fmt: skip
    settings = {}
    for name in (*DATASETS, *E_NAMES):
        fields = dataset_fields(dataset(name), prompts, chat) | {"min_new_tokens": 0}
        if fields.pop("end_tokens"):
            fields["stop"] = "\n"
        settings[name] = fields | {"max_context": max_length - fields["max_new_tokens"]}
    return Protocol(
        stop=None, truncated="chat", truncation="suffix", keep_first=_AUTHORS_FIRST,
        max_context=max_length, window=_AUTHORS_WINDOW, datasets=settings, **changes,
    )  # fmt: skip


def protocol(profile: Any, length: int, folder: Path | None) -> Protocol:
    """authors, limited to the profile's prompt_limit, else to `length` tokens."""
    return authors(load_prompts(folder), profile.prompt_limit or length, chat=profile.chat,
                   sink=profile.sink, local=profile.local, seed=profile.seed)  # fmt: skip


BENCHMARK = Benchmark(records, protocol, (*DATASETS, *E_NAMES), reads_files=True, limited=True)
