"""Captured layers on disk: a file for each sequence, of which a layer's part is read alone.

Tensors are "positions" and "3.queries", "3.keys" and, where captured, "3.values" for layer 3; how
logits are made of them is in the file's metadata, as JSON: {"3": {"scaling": ..., "softcap": ...}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hashattn.base.files import FileError
from hashattn.base.tensors import write_tensors
from hashattn.hashing.capture import CapturedLayer

CAPTURE_FORMAT = 2  # raise when files change: captures in another format are made again
_LOGITS = "logits"  # the metadata's key


def save_captures(path: Path, captures: Mapping[int, CapturedLayer]) -> None:
    """Write the layers of one sequence, all captured at the same positions, atomically."""
    tensors, logits = {}, {}
    for layer, captured in captures.items():
        tensors |= {f"{layer}.queries": captured.queries, f"{layer}.keys": captured.keys}
        if captured.values is not None:
            tensors[f"{layer}.values"] = captured.values
        tensors["positions"] = captured.positions
        # JSON keeps floats to the last bit, and None
        logits[layer] = {"scaling": captured.scaling, "softcap": captured.softcap}
    write_tensors(path, tensors, {_LOGITS: json.dumps(logits)})


def load_sequence(path: Path) -> dict[int, CapturedLayer]:
    """All layers of a sequence, on the CPU; FileError for a file that is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            layers = sorted(int(layer) for layer in json.loads(file.metadata()[_LOGITS]))
        return {layer: load_capture(path, layer, "cpu") for layer in layers}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
        raise FileError(
            f"{path} is missing or no captured sequence ({problem}): capture it again, or delete it"
        ) from problem


def load_capture(path: Path, layer: int, device: torch.device | str) -> CapturedLayer:
    """One layer of a sequence, on a device; the others are not read."""
    with safe_open(path, "pt") as file:

        def read(name: str) -> Tensor:
            return file.get_tensor(name).to(device)

        values = f"{layer}.values"
        return CapturedLayer(
            layer,
            queries=read(f"{layer}.queries"),
            positions=read("positions"),
            keys=read(f"{layer}.keys"),
            values=read(values) if values in file.keys() else None,  # noqa: SIM118, no mapping
            **json.loads(file.metadata()[_LOGITS])[str(layer)],
        )
