"""How much is read of a folder, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from hashattn.base.checks import require, require_numbers


@dataclass(frozen=True)
class ReadLimits:
    """Bounds of reading; what is past one is recorded as skipped. ValueError names a wrong field.

    file_bytes: of one file. documents: read at most. characters: of one document, whose rest is
    left out; total_characters: of all. files: looked at, in all folders. unpacked_bytes: of an
    Office file's parts together. seconds: for one file; total_seconds: for all. memory_bytes: of
    the process that reads (where the system can limit it: Linux).
    """

    file_bytes: int = 32 << 20
    documents: int = 1000
    characters: int = 2_000_000
    total_characters: int = 50_000_000
    files: int = 100_000
    unpacked_bytes: int = 256 << 20
    seconds: float = 30.0
    total_seconds: float = 600.0
    memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        times = ("seconds", "total_seconds")
        counts = {field: 1 for field in vars(self) if field not in times}
        require_numbers(vars(self), counts=counts, positive=times)
        least = 256 << 20  # below, Python and the libraries themselves do not fit
        require(self.memory_bytes >= least, "memory_bytes", self.memory_bytes, f"at least {least}")
