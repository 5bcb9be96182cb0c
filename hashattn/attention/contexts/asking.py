"""Many questions about one context: a prefill for all of them, a batch for some at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hashattn.attention.attachment import attachment_of
from hashattn.attention.contexts.context import Context
from hashattn.attention.contexts.text import ids_after
from hashattn.attention.receipt import Receipt
from hashattn.base.checks import require, require_numbers
from hashattn.models.families import max_positions

_TOGETHER = 8  # questions


@dataclass(frozen=True)
class Answers:
    """What a model answered. tokens: ids of each answer, without padding behind it. receipt: of the
    attachment, since it began or `reset_receipt`; None for a model without sparse attention."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    receipt: Receipt | None


def ask(
    model: PreTrainedModel, tokenizer: Any, context: Context, questions: Sequence[str], *,
    max_new_tokens: int = 64, together: int = _TOGETHER, **settings: Any,
) -> Answers:  # fmt: skip
    """Answer questions about a context that was read before, each as if it were the only one.

    A question is tokenised after the context, whose own ids stay; where the context was read by a
    chat template, the template's rest follows it. together: questions in a batch, padded in front;
    its rows share the context's memory. settings: of `model.generate`, which by default is greedy.

    Sparse where sparse attention is attached. ContextError for another model or tokenizer than the
    context's, ValueError without questions, for an empty one, and for more positions than the model
    has.
    """
    counts = {"max_new_tokens": max_new_tokens, "together": together}
    require_numbers(counts, counts=dict.fromkeys(counts, 1))
    valid = len(questions) > 0 and not isinstance(questions, str)
    require(valid, "questions", questions, "a list of at least one text")
    several = settings.get("num_return_sequences") or 1
    require(several == 1, "num_return_sequences", several, "1: ask twice for two answers")
    if model is not context.model:
        context.check_model(model)
        context = Context(model, context.file)
    context.check_tokenizer(tokenizer)
    read = context.tokens
    asked = [ids_after(tokenizer, read, question + context.after) for question in questions]
    for question, ids in zip(questions, asked, strict=True):
        require(len(ids) > 0, "question", question, "a text with at least one token")
    _require_positions(model, len(read), max(map(len, asked)), max_new_tokens)
    tokens: list[tuple[int, ...]] = []
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | settings
    for start in range(0, len(asked), together):
        tokens += _answer(model, context, read, asked[start : start + together], settings)
    texts = tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens)
    attached = attachment_of(model)
    return Answers(texts, tuple(tokens), None if attached is None else attached.receipt)


def _answer(
    model: PreTrainedModel, context: Context, read: list[int], asked: list[list[int]],
    settings: dict[str, Any],
) -> list[tuple[int, ...]]:  # fmt: skip
    """Answers to a batch of questions, as ids."""
    ends = _ends(model)
    padding = model.generation_config.pad_token_id
    padding = (ends[0] if ends else 0) if padding is None else padding
    ids, mask = _padded(read, asked, padding, model.device)
    longest = ids.shape[1] - len(read)
    beams = settings.get("num_beams") or model.generation_config.num_beams or 1
    cache = context.cache(len(asked) * beams, room=longest + settings["max_new_tokens"])
    sequences = model.generate(
        ids, attention_mask=mask, past_key_values=cache, pad_token_id=padding, **settings
    )
    return [_cut(row[ids.shape[1] :].tolist(), ends) for row in sequences]


def _padded(
    read: list[int], asked: list[list[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids (batch, n) of the context and each question, padding between the two, and their mask."""
    longest = max(map(len, asked))
    ids = [[*read, *[padding] * (longest - len(question)), *question] for question in asked]
    mask = torch.ones((len(ids), len(ids[0])), dtype=torch.long, device=device)
    for row, question in enumerate(asked):
        mask[row, len(read) : len(read) + longest - len(question)] = 0
    return torch.tensor(ids, device=device), mask


def _ends(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _cut(ids: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    """An answer up to the token that ends it; padding follows it in a batch."""
    place = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[: place + 1])


def _require_positions(model: PreTrainedModel, read: int, longest: int, new: int) -> None:
    positions, needed = max_positions(model.config), read + longest + new
    if positions and needed > positions:
        raise ValueError(
            f"context, question and answer need up to {needed:,} positions and the model has "
            f"{positions:,}: read a shorter document, ask for fewer max_new_tokens (now {new}), or "
            "choose a model with more"
        )
