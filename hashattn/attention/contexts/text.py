"""Documents and questions as token ids: the document's are the same whatever is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PLACE = "<<document and question>>"  # stands for them while the template is taken apart
_TAIL = 16  # tokens before a question that may decide how it is cut


def template_of(tokenizer: Any, chat: bool | None) -> tuple[str, str]:
    """What a chat template writes before a user's message and after it, up to the answer; nothing
    without one. chat: as in `Context.read`, whose ValueError this is."""
    has_one = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_one:
        raise ValueError(
            "chat = True needs a tokenizer with a chat template, and this one has none: set "
            "chat = False for a base model, or give the tokenizer its template"
        )
    if chat is False or not has_one:
        return "", ""
    message = [{"role": "user", "content": _PLACE}]
    whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, place, after = whole.rpartition(_PLACE)
    if not place:
        raise ValueError(
            "the tokenizer's chat template changes what a user says, so a document cannot be read "
            "apart from its questions: set chat = False, and write the template into both"
        )
    return before, after


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that begins a prompt, with one beginning-of-sequence token, which some chat
    templates already write."""
    bos = tokenizer.bos_token
    return tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]


def ids_after(tokenizer: Any, tokens: Sequence[int], text: str) -> list[int]:
    """Ids of a text that follows these tokens: as in one text with them where they stay as they
    are, else (the text would merge into the last one) as a text of its own."""
    tail = list(tokens[-_TAIL:])
    before = tokenizer.decode(tail, clean_up_tokenization_spaces=False)
    together = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if together[: len(tail)] == tail:
        return together[len(tail) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]
