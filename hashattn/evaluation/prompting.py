"""Token ids of a record's prompt: what is prefilled, the question that follows, and what was cut.

The protocol's limit (max_context) never cuts silently: the prompt says how many tokens went, and
whether the answer went with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hashattn.base.checks import require
from hashattn.base.errors import HashAttnError
from hashattn.evaluation.metrics import holds_answer
from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record
from hashattn.models.families import max_positions

_EXTRA_TOKENS = 2  # past the longest answer: the stop string, and one if the model runs on


class PromptTooLongError(HashAttnError, ValueError):
    """A prompt and its answer need more positions than the model has."""


@dataclass(frozen=True)
class Cut:
    """What the protocol's limit took from a prompt; a result row has these fields where it did.

    uncut_tokens: before the cut, of what the limit counts (Protocol.truncated); cut_tokens: left
    out. answer_in_context: an accepted answer occurs in the record's context; answer_kept: one
    occurs in what is left of it. Both ignore case and spacing.
    """

    uncut_tokens: int
    cut_tokens: int
    answer_in_context: bool
    answer_kept: bool


@dataclass(frozen=True)
class Prompt:
    """A record's prompt as token ids: `context` is prefilled, `question` follows. cut: None where
    the protocol's limit left all of it."""

    context: list[int]
    question: list[int]
    cut: Cut | None = None


def encode_prompt(
    tokenizer: Any, protocol: Protocol, record: Record
) -> tuple[list[int], list[int]]:
    """(context ids, question ids) of a record: make_prompt without the note of what was cut."""
    prompt = make_prompt(tokenizer, protocol, record)
    return prompt.context, prompt.question


def make_prompt(tokenizer: Any, protocol: Protocol, record: Record) -> Prompt:
    """A record's prompt, truncated as its dataset's protocol says.

    Records of one context share the context ids where the protocol truncates the context alone;
    where it truncates whole prompts, they may not. truncated = "prompt" is LongBench's own way:
    what the limit leaves becomes text and then tokens again. Around the cut these may differ
    (accents, CJK), so that a prompt may exceed max_context by a few tokens, and by those of the
    chat template; require_positions checks the result.
    Raises ValueError for a prompt over max_context that may not be truncated, and for chat = True
    with a tokenizer that has no chat template.
    """
    if protocol.truncated == "context":
        return _shared_prompt(tokenizer, protocol, record)
    return _whole_prompt(tokenizer, protocol, record)


def answer_tokens(tokenizer: Any, protocol: Protocol, record: Record) -> int:
    """Most tokens of an answer: the protocol's max_new_tokens, else those of the longest accepted
    one and _EXTRA_TOKENS."""
    if protocol.max_new_tokens is not None:
        return protocol.max_new_tokens
    encoded = tokenizer(list(record.answers), add_special_tokens=False)["input_ids"]
    return max(len(ids) for ids in encoded) + _EXTRA_TOKENS


def require_positions(config: Any, tokenizer: Any, protocol: Protocol, record: Record) -> None:
    """PromptTooLongError where a prompt and its answer exceed the positions of a model's
    configuration; one without max_position_embeddings has no limit."""
    positions = max_positions(config)
    if not positions:
        return
    prompt = make_prompt(tokenizer, protocol, record)
    tokens = len(prompt.context) + len(prompt.question)
    new = answer_tokens(tokenizer, protocol, record)
    excess = tokens + new - positions
    if excess <= 0:
        return
    if prompt.cut is None:
        advice = f"set max_context (now {protocol.max_context}) with truncation = 'middle'"
    else:
        advice = f"lower max_context = {protocol.max_context} by at least {excess}"
    raise PromptTooLongError(
        f"record {record._id!r} of {record.dataset!r} needs {tokens + new:,} positions, {tokens:,} "
        f"for the prompt and {new:,} for the answer, and the model has {positions:,} "
        f"(max_position_embeddings): {advice}, take the record out, or choose a model with more"
    )


def end_token_ids(tokenizer: Any, protocol: Protocol) -> frozenset[int]:
    """Ids of the protocol's end_tokens; ValueError for a text that is not one token."""
    end_ids = set()
    for text in protocol.end_tokens:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # the last id: some tokenizers put a prefix token before a text (Llama 2 before "\n")
        valid = bool(ids) and tokenizer.decode(ids[-1:]) == text
        allowed = (
            f"texts that are one token of this tokenizer each, which {text!r} is not; leave it "
            "out, or use `stop`, which ends an answer at a text"
        )
        require(valid, "end_tokens", protocol.end_tokens, allowed)
        end_ids.add(ids[-1])
    return frozenset(end_ids)


def _shared_prompt(tokenizer: Any, protocol: Protocol, record: Record) -> Prompt:
    """The question's ids are those it has within the whole prompt if the context has the same ids
    there as alone; else (tokens merge across the seam) the two parts are tokenised apart."""
    context, question = protocol.split_prompt(record.context, record.input)
    shared = tokenizer(context)["input_ids"]
    whole = tokenizer(context + question)["input_ids"]
    if whole[: len(shared)] == shared:
        rest = whole[len(shared) :]
    else:
        rest = tokenizer(question, add_special_tokens=False)["input_ids"]
    parts = protocol.truncate(shared)
    cut = _cut(tokenizer, record, question, shared, parts)
    return Prompt([token for part in parts for token in part], rest, cut)


def _whole_prompt(tokenizer: Any, protocol: Protocol, record: Record) -> Prompt:
    """The prompt as one text, cut before or after the chat template, then split in two."""
    context, question = protocol.split_prompt(record.context, record.input)
    prompt, cut = context + question, None
    if protocol.truncated == "prompt":
        whole = tokenizer(prompt)["input_ids"]
        parts = protocol.truncate(whole)
        cut = _cut(tokenizer, record, question, whole, parts)
        if cut:  # LongBench goes back to text here, so the seam is tokenised anew
            prompt = "".join(_texts(tokenizer, parts))
    if protocol.chat:
        prompt = _chat(tokenizer, prompt)
    ids = _tokenize(tokenizer, prompt)
    question_tokens = protocol.window or _question_tokens(tokenizer, prompt, ids, question)
    if protocol.truncated == "chat":
        parts = protocol.truncate(ids)
        cut = _cut(tokenizer, record, question, ids, parts)
        ids = [token for part in parts for token in part]
    prefilled = max(1, len(ids) - question_tokens)
    return Prompt(ids[:prefilled], ids[prefilled:], cut)


def _texts(tokenizer: Any, parts: Sequence[Sequence[int]]) -> list[str]:
    return [tokenizer.decode(part, skip_special_tokens=True) for part in parts]


def _cut(
    tokenizer: Any, record: Record, question: str, tokens: Sequence[int],
    parts: Sequence[Sequence[int]],
) -> Cut | None:  # fmt: skip
    """What the limit took from `tokens`, of which it left `parts`; None if that is all of them.

    An answer counts as kept if it occurs in one part, the question itself left out.
    """
    if len(parts) == 1:
        return None
    *before, last = _texts(tokenizer, parts)
    question = question.strip()
    if question and question in last:
        last = last[: last.rindex(question)]
    return Cut(
        uncut_tokens=len(tokens),
        cut_tokens=len(tokens) - sum(map(len, parts)),
        answer_in_context=bool(holds_answer(record.context, record.answers)),
        answer_kept=any(holds_answer(text, record.answers) for text in (*before, last)),
    )


def _chat(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "chat = True needs a tokenizer with a chat template, and this one has none: set "
            "chat = False for a base model, or give the tokenizer its template"
        )
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids with one beginning-of-sequence token, which some chat templates already write."""
    bos = tokenizer.bos_token
    has_bos = bool(bos) and text.startswith(bos)
    return tokenizer(text, add_special_tokens=not has_bos)["input_ids"]


def _question_tokens(tokenizer: Any, prompt: str, ids: list[int], question: str) -> int:
    """How many of the prompt's last tokens are the question and what the chat template adds."""
    start = prompt.rfind(question.strip())  # templates may strip the message
    if start < 0:  # the truncation cut into it
        return len(tokenizer(question, add_special_tokens=False)["input_ids"])
    before = _tokenize(tokenizer, prompt[:start])
    shared = 0  # a token across the seam belongs to the question
    while shared < min(len(before), len(ids)) and before[shared] == ids[shared]:
        shared += 1
    return max(1, len(ids) - shared)
