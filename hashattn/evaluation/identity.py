"""Content hashes of records: with code, model, tokenizer, method and protocol they key results."""

from __future__ import annotations

from hashattn.evaluation.records import Record
from hashattn.models.identity import fingerprint


def record_sha256(record: Record) -> str:
    """SHA-256 over what a record asks and accepts; its _id and length do not matter."""
    classes = None if record.all_classes is None else list(record.all_classes)
    return fingerprint(
        [record.dataset, record.context, record.input, list(record.answers), classes]
    )


def context_sha256(record: Record) -> str:
    """SHA-256 of the record's context."""
    return fingerprint(record.context)
