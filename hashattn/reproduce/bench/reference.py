"""Results that come with the repository, labelled with the machine that measured them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hashattn.base.repository import repository
from hashattn.reproduce.bench.record import load


def reference_path(device: str) -> Path:
    """data/reference/bench_cpu.json or bench_gpu.json."""
    return repository() / "data" / "reference" / f"bench_{device}.json"


def stored(device: str) -> dict[str, Any] | None:
    """The committed result file of `make bench` ("cpu") or `make gpu` ("gpu"), None without one."""
    path = reference_path(device)
    return load(path) if path.is_file() else None


def label(record: dict[str, Any]) -> str:
    """One line that says where and when a record was measured."""
    packages = record["environment"]["packages"]
    names = [
        f"{name} {packages[name]}" for name in ("torch", "triton", "numba") if name in packages
    ]
    return f"measured on {record['environment']['device']}, {record['date']}, {', '.join(names)}"
