"""Captured sequences for adapting, on disk and dealt: what trains, what chooses, what judges.

Maps learn from one part, early stopping chooses by another, and a third judges. Every 4th sequence
is held out, or the last of fewer; of its rows every other one chooses, and the others, which lie
between them and see the same keys, judge. Of a single sequence half of the rows train, a quarter
chooses and a quarter judges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashattn.base.errors import HashAttnError
from hashattn.hashing.capture import CapturedLayer
from hashattn.hashing.capture_files import load_sequence, save_captures
from hashattn.hashing.labels import candidate_mask
from hashattn.hashing.maps import HashConfig
from hashattn.trust.retraining.captures import CapturedSequence

_HELD_OUT = 4


class AdaptError(HashAttnError, ValueError):
    """There is too little to adapt to, or it is of another model."""


@dataclass(frozen=True)
class Dealt:
    """Files (hashing.capture_files) of a domain: for training, choosing and judging.

    layers: those that were captured. by: what was held out, "sequences" or, of a single one, "rows"
    (which judges by the keys that were trained on). record: of the data, for the card.
    """

    train: list[Path]
    choose: list[Path]
    judge: list[Path]
    layers: tuple[int, ...]
    by: str
    record: dict[str, Any]


def deal(
    sequences: Iterable[CapturedSequence],
    folder: Path,
    config: HashConfig,
    window: tuple[int, int],
    domain: str,
) -> Dealt:
    """Write captured sequences to `folder`, one after the other, and deal them.

    window: sink and local, which no hash is asked for. domain: what messages call the sequences.
    AdaptError where there is none, where they are of other layers or shapes than config or than
    each other, and for a part that has no row with a token outside the window.
    """
    whole, digest, tokens, rows = [], hashlib.sha256(), 0, 0
    layers: set[int] = set()
    for number, sequence in enumerate(sequences):
        kept = {layer: c for layer, c in sorted(sequence.items()) if layer in config.layers}
        _check(kept, layers or set(kept), config, f"{domain} sequence {number}")
        layers = set(kept)
        whole.append(folder / f"{domain}_{number:05d}.safetensors")
        save_captures(whole[-1], kept)
        first = next(iter(kept.values()))
        tokens, rows = tokens + first.keys.shape[1], rows + len(first.positions)
        for captured in kept.values():
            for part in (captured.positions, captured.queries, captured.keys):
                digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    if not whole:
        raise AdaptError(
            f"there are no {domain} sequences: let a Reservoir listen while contexts are decoded, "
            "or pass captures of texts or tokens"
        )
    parts = _deal(whole)
    for name, files in zip(("training", "choosing", "judging"), parts, strict=True):
        if not any(_has_candidates(path, *window) for path in files):
            raise AdaptError(
                f"none of the {rows} rows of {len(whole)} {domain} sequences that would be for "
                f"{name} sees a token beside the sink and the {window[1]} latest: pass more "
                "sequences, more rows or longer ones"
            )
    record = {
        "sequences": len(whole),
        "tokens": tokens,
        "rows": rows,
        "sha256": digest.hexdigest(),
        "held_out": "sequences" if len(whole) > 1 else "rows",
    }
    return Dealt(*parts, tuple(sorted(layers)), record["held_out"], record)


def _deal(whole: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    if len(whole) == 1:
        return (
            _split(whole[0], (0, 2), ""),
            _split(whole[0], (1,), "c"),
            _split(whole[0], (3,), "j"),
        )
    held_out = whole[_HELD_OUT - 1 :: _HELD_OUT] or whole[-1:]
    choose = [part for path in held_out for part in _split(path, (0, 2), "c")]
    judge = [part for path in held_out for part in _split(path, (1, 3), "j")]
    return [path for path in whole if path not in held_out], choose, judge


def _split(path: Path, quarters: tuple[int, ...], suffix: str) -> list[Path]:
    """The file of those rows of a sequence whose number, modulo 4, is in `quarters`."""
    sequence = load_sequence(path)
    number = torch.arange(len(next(iter(sequence.values())).positions))
    chosen = torch.isin(number % _HELD_OUT, torch.tensor(quarters))
    if not chosen.any():
        return []
    part = path.with_stem(f"{path.stem}{suffix or 't'}")
    save_captures(part, {layer: _rows(c, chosen) for layer, c in sequence.items()})
    return [part]


def _rows(captured: CapturedLayer, chosen: Tensor) -> CapturedLayer:
    return replace(
        captured, queries=captured.queries[:, chosen], positions=captured.positions[chosen]
    )


def _has_candidates(path: Path, sink: int, local: int) -> bool:
    captured = next(iter(load_sequence(path).values()))
    return bool(candidate_mask(captured.positions, captured.keys.shape[1], sink, local).any())


def _check(sequence: CapturedSequence, layers: set[int], config: HashConfig, name: str) -> None:
    if not sequence or set(sequence) != layers:
        raise AdaptError(
            f"{name} has layers {sorted(sequence)} of those with hash maps, {list(config.layers)}; "
            f"needed are {sorted(layers) or 'some'}: capture the same layers of every sequence"
        )
    for captured in sequence.values():
        heads, rows, dim = captured.queries.shape
        found = {"query_heads": heads, "kv_heads": len(captured.keys), "head_dim": dim}
        for field, value in found.items():
            if value != getattr(config, field):
                raise AdaptError(
                    f"{name} has {field} {value} and the hash weights {getattr(config, field)}: "
                    "it was captured from another model"
                )
        if not rows or not torch.isfinite(captured.queries).all():
            raise AdaptError(
                f"{name} has no rows, or queries that are not finite: capture it again"
            )
