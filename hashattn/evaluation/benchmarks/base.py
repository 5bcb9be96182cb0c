"""What a benchmark is: records, and the protocol by which they are answered and scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashattn.evaluation.protocol import Protocol
from hashattn.evaluation.records import Record


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, for every profile that names it.

    records(profile, tokenizer, length, samples, folder): `samples` records of each of the profile's
    tasks, for contexts of `length` tokens. protocol(profile, length, folder): how they are asked.
    folder: where the profile's data are, None for a benchmark whose records are generated.
    tasks: what a profile's tasks may be, None for any names. reads_files: whether records are read
    from the folder that the profile calls `data`; otherwise they are generated, and `data` is null.
    limited: whether the profile's prompt_limit may cut its prompts. drawn: whether a profile with
    another seed has other records of the same tasks.
    """

    records: Callable[[Any, Any, int, int, Path | None], list[Record]]
    protocol: Callable[[Any, int, Path | None], Protocol]
    tasks: tuple[str, ...] | None = None
    reads_files: bool = False
    limited: bool = False
    drawn: bool = False
