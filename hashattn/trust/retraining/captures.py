"""Where adapting learns from beside running traffic: tokens, texts, and captures kept on disk.

A captured sequence is {layer: CapturedLayer}, every layer at the same positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hashattn.base.checks import require_numbers
from hashattn.hashing.capture import CapturedLayer, capture
from hashattn.hashing.capture_files import load_sequence, save_captures

CapturedSequence = Mapping[int, CapturedLayer]
_FILES = "sequence_*.safetensors"


def captured_tokens(
    model: nn.Module, sequences: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[dict[int, CapturedLayer]]:
    """Captures of (token ids (n,), positions of queries (rows,)), one after the other; raises what
    `hashing.capture` does."""
    for ids, rows in sequences:
        yield capture(model, ids, rows=rows)


def text_sequences(
    tokenizer: Any, texts: Iterable[str], length: int, rows: int = 192, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """(token ids (n,), positions (rows,)) of texts for `captured_tokens`: the first `length` tokens
    of each and, for queries, `rows` random positions of its later half."""
    require_numbers({"length": length, "rows": rows}, counts={"length": 2, "rows": 1})
    made = []
    for number, text in enumerate(texts):
        ids = torch.tensor(tokenizer(text)["input_ids"][:length])
        later = range(len(ids) // 2, len(ids))
        drawn = random.Random(f"{seed}/{number}").sample(later, min(rows, len(later)))
        made.append((ids, torch.tensor(sorted(drawn), dtype=torch.long)))
    return made


def save_sequences(folder: str | Path, sequences: Iterable[CapturedSequence]) -> None:
    """Write captured sequences, such as `Reservoir.captured`, one file each, after those that the
    folder has; each atomically."""
    kept = [int(path.stem.rpartition("_")[2]) for path in Path(folder).glob(_FILES)]
    first = max(kept, default=-1) + 1
    for number, layers in enumerate(sequences, first):
        save_captures(Path(folder) / _FILES.replace("*", f"{number:05d}"), layers)


def load_sequences(folder: str | Path) -> Iterator[dict[int, CapturedLayer]]:
    """The captured sequences in a folder, one after the other, on the CPU; FileError for a file
    that is damaged."""
    for path in sorted(Path(folder).glob(_FILES)):
        yield load_sequence(path)
