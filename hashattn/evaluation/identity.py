"""Content hashes that key results: what code, model, tokenizer, method and sample made them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

import torch

from hashattn.evaluation.longbench import Record
from hashattn.evaluation.protocol import fingerprint
from hashattn.heads import gathered
from hashattn.source import packages, sources_sha256

WEIGHTS_PER_TENSOR = 4096  # evenly spaced; training moves nearly all weights, so a sample tells
CODE = (  # what can change a prediction, a score or a density
    "attention/*.py",
    "selectors/*.py",
    "heads.py",
    "trust/receipt.py",
    "hashing/maps.py",
    "evaluation/answering.py",
    "evaluation/cells.py",
    "evaluation/metrics.py",
    "evaluation/prompting.py",
    "evaluation/protocol.py",
    "evaluation/rouge.py",
    "evaluation/segment.py",
)


@cache
def code_version() -> str:
    """SHA-256 over the source files that decide a result, hashattn's and the kernels'."""
    package, kernels = packages()
    decisive = [path for pattern in CODE for path in package.glob(pattern)]
    return sources_sha256([*decisive, *kernels.rglob("*.py")])


def model_sha256(model: Any) -> str:
    """SHA-256 over configuration, dtype and a sample of every weight; moves with training or casts.

    Weights kept off the machine (meta tensors of an offloaded model) enter by name and shape only.
    Those of tensor parallelism are gathered, one at a time: all its processes have to call this,
    and get what one process alone gets.
    """
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta:
            digest.update(_sample(weight))
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's class, vocabulary and chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return fingerprint([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), template])


def record_sha256(record: Record) -> str:
    """SHA-256 over what a record asks and accepts; its _id and length do not matter."""
    classes = None if record.all_classes is None else list(record.all_classes)
    return fingerprint(
        [record.dataset, record.context, record.input, list(record.answers), classes]
    )


def context_sha256(record: Record) -> str:
    """SHA-256 of the record's context."""
    return fingerprint(record.context)


def _sample(weight: torch.Tensor) -> bytes:
    flat = gathered(weight.detach()).flatten()
    picked = flat[:: max(1, len(flat) // WEIGHTS_PER_TENSOR)].cpu().contiguous()
    return picked.view(torch.uint8).numpy().tobytes()
