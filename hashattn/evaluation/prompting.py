"""Token ids of a record's prompt: what is prefilled, and the question that follows."""

from __future__ import annotations

from typing import Any

from hashattn.evaluation.longbench import Record
from hashattn.evaluation.protocol import Protocol


def encode_prompt(
    tokenizer: Any, protocol: Protocol, record: Record
) -> tuple[list[int], list[int]]:
    """(context ids, question ids) of a record, truncated as its dataset's protocol says.

    Records of one context share the context ids where the protocol truncates the context alone;
    where it truncates whole prompts, they may not. Raises ValueError for a prompt over
    max_context that may not be truncated, and for a tokenizer without the asked chat template.
    """
    if protocol.truncated == "context":
        return _shared_prompt(tokenizer, protocol, record)
    return _whole_prompt(tokenizer, protocol, record)


def end_token_ids(tokenizer: Any, protocol: Protocol) -> frozenset[int]:
    """Ids of the protocol's end_tokens; ValueError for a text that is not one token.

    Of a text with a prefix token that the tokenizer adds ("\\n" of Llama 2), the last token counts.
    """
    found = set()
    for text in protocol.end_tokens:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or tokenizer.decode(ids[-1:]) != text:
            raise ValueError(
                f"end_tokens holds {text!r}, which is no token of this tokenizer; leave it out, or "
                "use `stop`, which ends an answer at a text"
            )
        found.add(ids[-1])
    return frozenset(found)


def _shared_prompt(
    tokenizer: Any, protocol: Protocol, record: Record
) -> tuple[list[int], list[int]]:
    """The question's ids are those it has within the whole prompt, wherever the context tokenises
    the same alone; else (merges across the seam) the two parts are tokenised apart."""
    context, question = protocol.split_prompt(record.context, record.input)
    shared = tokenizer(context)["input_ids"]
    whole = tokenizer(context + question)["input_ids"]
    if whole[: len(shared)] == shared:
        rest = whole[len(shared) :]
    else:
        rest = tokenizer(question, add_special_tokens=False)["input_ids"]
    return protocol.truncate(shared), rest


def _whole_prompt(
    tokenizer: Any, protocol: Protocol, record: Record
) -> tuple[list[int], list[int]]:
    """The prompt as one text, cut before or after the chat template, then split in two."""
    context, question = protocol.split_prompt(record.context, record.input)
    prompt = context + question
    if protocol.truncated == "prompt":
        parts = protocol.kept(tokenizer(prompt)["input_ids"])
        if len(parts) > 1:  # LongBench goes back to text here, so the seam is tokenised anew
            prompt = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    if protocol.chat:
        prompt = _chat(tokenizer, prompt)
    ids = _tokenize(tokenizer, prompt)
    asked = protocol.window or _question_tokens(tokenizer, prompt, ids, question)
    if protocol.truncated == "chat":
        ids = protocol.truncate(ids)
    cut = max(1, len(ids) - asked)  # one token at least is prefilled
    return ids[:cut], ids[cut:]


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
    begun = bool(bos) and text.startswith(bos)
    return tokenizer(text, add_special_tokens=not begun)["input_ids"]


def _question_tokens(tokenizer: Any, prompt: str, ids: list[int], question: str) -> int:
    """How many of the prompt's last tokens are the question and what the chat template adds."""
    asked = question.strip()  # templates may strip the message
    start = prompt.rfind(asked)
    if start < 0:  # the truncation cut into it
        return len(tokenizer(question, add_special_tokens=False)["input_ids"])
    before = _tokenize(tokenizer, prompt[:start])
    same = 0  # a token over the seam is the question's
    while same < min(len(before), len(ids)) and before[same] == ids[same]:
        same += 1
    return max(1, len(ids) - same)
