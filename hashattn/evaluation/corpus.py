"""The natural text of the haystacks and its split into training and evaluation paragraphs."""

import hashlib
from functools import cache
from pathlib import Path

DATA = Path(__file__).parents[2] / "data"
SPLITS = ("train", "eval")
EVAL_SHARE = 5  # one unit of text in five belongs to evaluation


def split_of(text: str) -> str:
    """The split that owns ``text``: decided by its SHA-256 alone, so the splits cannot overlap."""
    digest = hashlib.sha256(text.encode()).digest()
    return "eval" if digest[0] % EVAL_SHARE == 0 else "train"


def require_split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return split


@cache
def paragraphs(split: str, path: Path = DATA / "corpus" / "python_docs.txt") -> tuple[str, ...]:
    """Paragraphs of the corpus that belong to ``split`` ("train" or "eval"), one string each."""
    require_split(split)
    lines = path.read_text().splitlines()
    return tuple(line for line in lines if split_of(line) == split)
