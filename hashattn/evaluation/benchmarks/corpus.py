"""The natural text of the haystacks and its split into training and evaluation paragraphs."""

import hashlib
from functools import cache
from pathlib import Path

from hashattn.base.checks import require_one_of
from hashattn.base.files import read_text
from hashattn.base.repository import repository

_SPLITS = ("train", "eval")
_EVAL_SHARE = 5  # one unit of text in five belongs to evaluation


def split_of(text: str) -> str:
    """The split that owns `text`: decided by its SHA-256 alone, so the splits cannot overlap."""
    digest = hashlib.sha256(text.encode()).digest()
    return "eval" if digest[0] % _EVAL_SHARE == 0 else "train"


def require_split(split: str) -> str:
    """The split itself; ValueError unless it is one of _SPLITS."""
    require_one_of("split", split, _SPLITS)
    return split


def corpus_path() -> Path:
    """data/corpus/python_docs.txt of the checkout."""
    return repository() / "data" / "corpus" / "python_docs.txt"


def paragraphs(split: str) -> tuple[str, ...]:
    """Paragraphs of the corpus that belong to `split` ("train" or "eval"), one string each.

    The same object each time, as long as the checkout is the same, so that results can be cached by
    it.
    """
    return _paragraphs(require_split(split), corpus_path())


@cache
def _paragraphs(split: str, path: Path) -> tuple[str, ...]:
    return tuple(line for line in read_text(path).splitlines() if split_of(line) == split)
