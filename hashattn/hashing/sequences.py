"""What hash training learns from: sequences of tokens, and the rows whose queries it looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

SequenceRows = tuple[Tensor, Tensor]  # tokens (n,), positions (rows,), both int64
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, less their whole part, fill 0 to 1 evenly
_HELD_OUT = 8  # without a validation set, every 8th sequence is held out


def split_sequences(
    sequences: Iterable[SequenceRows], validation: Iterable[SequenceRows] | None
) -> tuple[list[SequenceRows], list[SequenceRows]]:
    """Sequences to train on and to validate with, tokens (n,) and sorted distinct rows (r,) on the
    CPU; every 8th of them is held out if there is no `validation`.

    ValueError for a sequence without tokens or rows, or where one of both lists is empty.
    """
    train = [_checked(s) for s in sequences]
    if validation is not None:
        held_out = [_checked(s) for s in validation]
    else:
        # fewer than 8: the last, unless it is the only one
        held_out = train[_HELD_OUT - 1 :: _HELD_OUT] or train[1:][-1:]
        held_out_ids = {id(s) for s in held_out}
        train = [s for s in train if id(s) not in held_out_ids]
    if not train or not held_out:
        raise ValueError(
            f"{len(train)} training and {len(held_out)} validation sequences: pass "
            "at least two sequences, or one and a validation set"
        )
    return train, held_out


def data_hash(sequences: Sequence[SequenceRows]) -> str:
    """sha256 over the tokens (n,) and rows (r,) of all sequences, in order."""
    digest = hashlib.sha256()
    for ids, rows in sequences:
        digest.update(f"{ids.numel()} {rows.numel()}\n".encode())
        digest.update(ids.numpy().tobytes() + rows.numpy().tobytes())
    return digest.hexdigest()


def data_record(sequences: Sequence[SequenceRows]) -> dict[str, Any]:
    """What a card says of the sequences: how many, how long, and their hash."""
    return {
        "sequences": len(sequences),
        "tokens": sum(ids.numel() for ids, _ in sequences),
        "longest": max(ids.numel() for ids, _ in sequences),
        "rows": sum(rows.numel() for _, rows in sequences),
        "sha256": data_hash(sequences),
    }


def shifts(sequences: Sequence[SequenceRows], reach: int | None) -> list[int]:
    """Position of the first token of each sequence: 0 for every other one, as short contexts begin
    there; the rest end anywhere up to `reach`, evenly. 0 without a reach."""
    return [
        int(max(0, (reach or 0) - ids.numel()) * (number // 2 * _GOLDEN % 1)) * (number % 2)
        for number, (ids, _) in enumerate(sequences)
    ]


def _checked(sequence: SequenceRows) -> SequenceRows:
    ids, rows = (torch.as_tensor(part).cpu().long().reshape(-1) for part in sequence)
    if not ids.numel() or not rows.numel():
        raise ValueError(
            f"a sequence has {ids.numel()} tokens and {rows.numel()} rows: each needs "
            "at least one of both"
        )
    return ids, rows.unique()
