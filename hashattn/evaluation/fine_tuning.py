"""Benchmark records as training sequences, so that hashes can be fine-tuned on a task.

`fine_tuning_split` (hashattn.evaluation.benchmarks.longbench) says which records may train;
`fine_tuning_sequences` turns them into what `hashattn.hashing.train_hash_weights` takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hashattn.evaluation.prompting import encode_prompt
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record


def fine_tuning_sequences(
    records: Iterable[Record], protocol: Protocol, tokenizer: Any, joint: str | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(token ids (n,), rows (r,)) int64 of each record: its prompt and its first answer; rows are
    the positions of the question and of the answer, whose queries run sparse in evaluation.

    The prompt is worded and truncated as its dataset's protocol says; an answer is cut after the
    protocol's max_new_tokens. joint: text between prompt and answer; None: a space where words
    would touch otherwise (`joined`). ValueError as encode_prompt, and for an answer without tokens.
    """
    return [_sequence(record, protocol, tokenizer, joint) for record in records]


def joined(prompt: str, answer: str, language: str = "en") -> str:
    """The answer as it continues the prompt: after a space, unless the prompt ends in white space,
    the answer begins with no letter or digit ("(a, b)"), or the text is Chinese."""
    no_space = prompt[-1:].isspace() or not answer[:1].isalnum() or language == "zh"
    return answer if no_space else " " + answer


def _sequence(
    record: Record, protocol: Protocol, tokenizer: Any, joint: str | None
) -> tuple[Tensor, Tensor]:
    context, question = encode_prompt(tokenizer, protocol, record)
    prompt, answer = tokenizer.decode(question), record.answers[0]
    text = joined(prompt, answer, record.language) if joint is None else joint + answer
    limit = protocol.of(record.dataset).max_new_tokens
    answer_ids = _continuation(tokenizer, prompt, text)[:limit]
    if not answer_ids:
        raise ValueError(
            f"record {record._id!r} of {record.dataset!r} has the answer {answer!r}, which has no "
            "tokens: leave it out, or give it another first answer"
        )
    ids = [*context, *question, *answer_ids]
    return torch.tensor(ids), torch.arange(len(context), len(ids))


def _continuation(tokenizer: Any, before: str, text: str) -> list[int]:
    """Token ids of `text` as it follows `before`; alone where tokens merge across the seam."""
    # some tokenizers put a space before every text, so that `text` alone would differ
    start, whole = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, before + text)
    )
    if whole[: len(start)] == start:
        return whole[len(start) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]
